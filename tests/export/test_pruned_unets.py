"""UNets of other depths, as SSD-1B's, Vega's, KOALA's and tiny-sd's, from both layouts against diffusers'."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.single_file_configs import Part, unet_config
from calotype.export.single_file_keys import unet_table
from calotype.export.weights import load_module
from calotype.runtime.errors import UnsupportedArchitectureError
from tests.export.original_layout import original_unet

XL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 1, 1),
    "cross_attention_dim": 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
PRUNED: dict[str, dict[str, Any]] = {
    # Other depths on the way up than on the way down, and a middle without attention.
    "ssd-1b": XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [3, 3]],
        "reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 1],
    },
    "vega": XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 2],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
    "koala-700m": XL | {"mid_block_type": None, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]},
    # Three levels, all with attention, and no middle.
    "tiny-sd": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
    },
}


@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_unet_computes_what_diffusers_does_from_both_layouts(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        torch.manual_seed(0)
        reference = diffusers.UNet2DConditionModel(**PRUNED[name]).eval()
        reference.save_config(tmp_path)
    state = reference.state_dict()
    config = UNetConfig.from_json(json.loads((tmp_path / "config.json").read_text()))
    part = Part("", original_unet(state, config.layers[0]))
    pooled = 16 if "addition_embed_type" in PRUNED[name] else None
    read_off = unet_config(part, heads=8 if name == "tiny-sd" else None, pooled_width=pooled)
    assert (read_off.depths, read_off.up_depths) == (config.depths, config.up_depths)
    assert (read_off.mid_block_type, read_off.layers) == (config.mid_block_type, config.layers)
    generator = torch.Generator().manual_seed(1)
    sample, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 12), (2, 5, 24)))
    timestep, more, theirs = torch.tensor([3.0, 981.0]), [], {}
    if pooled is not None:
        more = [torch.randn(2, 16, generator=generator), torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)]
        theirs = {"added_cond_kwargs": {"text_embeds": more[0], "time_ids": more[1]}}
    with torch.no_grad():
        expected = reference(sample, timestep, context, **theirs).sample
        for ours in (
            load_module(UNet, config, state, "UNet"),
            load_module(UNet, read_off, part, "UNet", unet_table(read_off)),
        ):
            assert ours.state_dict().keys() == state.keys()
            torch.testing.assert_close(ours(sample, timestep, context, *more), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "UNetMidBlock2DCrossAttn, UNetMidBlock2D, None",
        ),
        ({"transformer_layers_per_block": [1, 2]}, "supported: one for each of 4 blocks, or one number"),
        ({"reverse_transformer_layers_per_block": [[1, 2], 1, 1, 1]}, "supported: 3 whole numbers, or one"),
    ],
)
def test_other_depths_and_middles_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        UNetConfig.from_json(settings)
