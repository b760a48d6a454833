"""T2I-Adapters against diffusers' own, in every layout; and where a UNet adds what they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calotype.export.graphs import feature_specs, residual_specs
from calotype.export.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.parity import run_graph
from calotype.export.sources import load_checkpoint
from calotype.export.tracing import write_graph
from calotype.export.weights import to_float32, write_weights
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError
from tests.export.conftest import LAYERS, UNETS
from tests.t2i_adapters import adapter, original_adapter

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


# What reads how many channels, as published ones do.
PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    ("canny", "sd1", {"in_channels": 1, "channels": (8, 16, 24, 24)}),
    ("color", "sd1", {"adapter_type": "light_adapter", "channels": (8, 16, 24), "num_res_blocks": 4}),
    ("xl", "sdxl", {"adapter_type": "full_adapter_xl", "downscale_factor": 16, "channels": (8, 16, 24, 24)}),
]


@pytest.mark.parametrize("layout", ["folder", "diffusers", "original"])
@pytest.mark.parametrize(("name", "family", "settings"), PUBLISHED, ids=[name for name, _, _ in PUBLISHED])
def test_it_computes_what_diffusers_does_from_every_layout(
    tmp_path: Path, name: str, family: str, settings: dict[str, Any], layout: str
) -> None:
    reference = adapter(1, **settings)
    state = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    path = tmp_path / f"t2iadapter_{name}_sd14v1.pth"
    if layout == "folder":
        path = tmp_path / "adapter"
        reference.save_pretrained(path)
    elif layout == "diffusers":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save(original_adapter(state, settings.get("num_res_blocks", 2), light=name == "color"), path)
    checkpoint = load_checkpoint(path)
    own = checkpoint.components["t2i_adapter"]
    assert isinstance(own, T2IAdapter)
    to_float32(own)
    # Latents of 14 x 10 in SDXL, whose control picture's halves are odd; else of 13 x 9.
    height, width = (14, 10) if name == "xl" else (13, 9)
    picture = torch.rand(2, own.config.in_channels, 8 * height, 8 * width)
    with torch.no_grad():
        expected, got = reference(picture), own(picture)
    assert (checkpoint.family, checkpoint.kind, own.config.downscale) == (family, "control", 8)
    sizes = {"rows": 2, "height": height, "width": width}
    (plan,) = checkpoint.graphs
    for spec, one, other in zip(plan.outputs, got, expected, strict=True):
        assert tuple(one.shape) == spec.resolve(sizes)
        assert torch.equal(one, other)
    if layout == "folder":
        write_weights(own, tmp_path / "t2i_adapter.safetensors", torch.float16)
        write_graph(plan, tmp_path / "t2i_adapter.safetensors", tmp_path / "graph.onnx")
        made = run_graph(tmp_path / "graph.onnx", {"odd": {"control_image": picture.numpy()}})["odd"]
        with torch.no_grad():
            rounded = own(picture)
        for one, other in zip(made, rounded, strict=True):
            assert float(abs(one - other.numpy()).max() / other.abs().max()) < 1e-5


def test_what_is_none_of_them_gets_one_line(tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in adapter(1, channels=(8, 16)).state_dict().items()}
    path = tmp_path / "a.safetensors"
    odd = {**state, "adapter.conv_in.weight": torch.ones(8, 100, 3, 3)}
    more = {**state, "adapter.body.5.resnets.0.block1.bias": torch.ones(1)}
    for given, message in (
        (odd, r"adapter\.conv_in\.weight reads 100 channels; published ones 64, 192, 256, 768"),
        (more, r"the file has no adapter\.body\.2\.resnets\.0\.block1\.weight"),
        ({**state, "other.a": torch.ones(1)}, r"1 unexpected: other\.a"),
    ):
        save_file(given, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    save_file(state, path)
    with pytest.raises(InputError, match="is a T2I-Adapter, whose averaged weights are not read; export without --ema"):
        load_checkpoint(path, ema=True)
    with pytest.raises(
        UnsupportedArchitectureError, match="adapter_type='style' is not supported; supported: full_ada"
    ):
        T2IAdapterConfig(adapter_type="style")
    with pytest.raises(UnsupportedArchitectureError, match="reads 4 channels is not supported; supported: 1 and 3"):
        T2IAdapterConfig(in_channels=4)
