"""T2I-Adapters against diffusers' own, in every layout; and where a UNet adds what they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calotype.export.graphs import feature_specs, residual_specs
from calotype.export.models.unet import UNet, UNetConfig
from tests.export.conftest import LAYERS, UNETS

SIZES = {"rows": 2, "height": 12, "width": 8}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_unet_adds_features_and_residuals_where_diffusers_does(family: str) -> None:
    import diffusers

    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(**UNETS[family], layers_per_block=LAYERS).eval()
    own = UNet(UNetConfig.from_json(dict(reference.config))).eval()
    own.load_state_dict(reference.state_dict())
    rows: dict[str, Any] = {
        "sample": torch.randn(2, 4, 12, 8),
        "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, own.config.cross_attention_dim),
    }
    more = {}
    if family == "sdxl":
        more = {"text_embeds": torch.randn(2, 64), "time_ids": torch.rand(2, 6) * 512}
    features = [torch.randn(spec.resolve(SIZES)) for spec in feature_specs(own.config)]
    residuals = [torch.randn(spec.resolve(SIZES)) for spec in residual_specs(own.config)]
    names = [spec.name for spec in (*feature_specs(own.config), *residual_specs(own.config))]
    with torch.no_grad():
        expected = reference(
            **rows,
            added_cond_kwargs=more,
            # What is left over behind the blocks is added to the middle where it has its shape.
            down_intrablock_additional_residuals=[feature.clone() for feature in features],
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
        ).sample
        got = own.controlled(**rows, **more, **dict(zip(names, [*features, *residuals], strict=True)))
        zero = dict(zip(names, [0 * tensor for tensor in (*features, *residuals)], strict=True))
        for index, name in enumerate(names):  # each of them counts
            without = own.controlled(**rows, **more, **{**zero, name: [*features, *residuals][index]})
            assert float((without - own(**rows, **more)).abs().max()) > 1e-3, name
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
