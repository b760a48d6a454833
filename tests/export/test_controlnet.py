"""ControlNets in both layouts against diffusers' own, their zero convolutions given values; and their bundles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from calotype.export.bundle import export_checkpoint
from calotype.export.models.controlnet import ControlNet, ControlNetConfig
from calotype.export.models.controlnet_union import ControlNetUnion, ControlNetUnionConfig
from calotype.export.sources import load_checkpoint
from calotype.export.verification import verify_against
from calotype.export.weights import to_float32
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError
from tests.controlnets import controlnet, write_controlnet
from tests.export.conftest import LAYERS, UNETS
from tests.export.original_layout import original_unet, prefixed

FAMILIES = ("sd1", "sd2", "sdxl")


def settings(family: str) -> dict[str, Any]:
    """Of a ControlNet for the small UNet of ``family``, its picture 8 pixels to a latent."""
    unet = {name: value for name, value in UNETS[family].items() if name != "up_block_types"}
    if family == "sdxl":
        # What a single file tells of SDXL's sizes is their published width.
        unet |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256}
    return {**unet, "layers_per_block": LAYERS, "conditioning_embedding_out_channels": (4, 8, 12, 16)}


def original_controlnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' state dict as lllyasviel's files spell it."""
    half = {name: tensor for name, tensor in state.items() if not name.startswith("controlnet_")}
    found = original_unet(half, LAYERS)
    blocks = max(int(name.split(".")[2]) for name in state if name.startswith("controlnet_cond_embedding.blocks")) + 1
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "controlnet_cond_embedding":
            number = {"conv_in": 0, "conv_out": 2 * (blocks + 1)}.get(rest[0])
            found[f"input_hint_block.{2 * (int(rest[1]) + 1) if number is None else number}.{rest[-1]}"] = tensor
        elif first == "controlnet_down_blocks":
            found[f"zero_convs.{rest[0]}.0.{rest[1]}"] = tensor
        elif first == "controlnet_mid_block":
            found[f"middle_block_out.0.{rest[0]}"] = tensor
    return found


def loaded(path: Path) -> ControlNet:
    module = load_checkpoint(path).components["controlnet"]
    assert isinstance(module, ControlNet)
    to_float32(module)
    return module


def residuals(model: Any, inputs: Mapping[str, Tensor], scale: float, **more: Any) -> list[Tensor]:
    """What diffusers' model makes of them."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    first = [inputs[name] for name in ("sample", "timestep", "encoder_hidden_states", "control_image")]
    with torch.no_grad():
        down, middle = model(*first, scale, added_cond_kwargs=added or None, return_dict=False, **more)
    return [*down, middle]


def inputs_for(config: ControlNetConfig) -> dict[str, Tensor]:
    """Two rows of 11 x 8 latents: neither survives halving and doubling."""
    torch.manual_seed(3)
    found = {
        "sample": torch.randn(2, 4, 11, 8),
        "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, config.cross_attention_dim),
        "control_image": torch.rand(2, 3, 88, 64),
    }
    if config.addition_embed_type is not None:
        dim, size = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        assert dim is not None and size is not None
        found |= {"text_embeds": torch.randn(2, dim - 6 * size), "time_ids": torch.rand(2, 6) * 512}
    return found


def made(model: ControlNet, inputs: Mapping[str, Tensor], scales: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(**inputs, conditioning_scale=scales.expand(2, -1)))


@pytest.mark.parametrize("layout", ["folder", "diffusers", "original", "prefixed", "pth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_diffusers_does_from_every_layout(tmp_path: Path, family: str, layout: str) -> None:
    if family == "sdxl" and layout != "folder" and layout != "diffusers":
        pytest.skip("SDXL's single files are in diffusers' layout")
    reference = controlnet(1, **settings(family))
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    path = tmp_path / "control.safetensors"
    if layout == "folder":
        path = tmp_path / "control"
        reference.save_pretrained(path)
    elif layout == "diffusers":
        save_file(state, path)
    elif layout == "original":
        save_file(original_controlnet(state), path)
    else:
        original = prefixed("control_model.", original_controlnet(state))
        if layout == "prefixed":
            save_file(original, path)
        else:
            path = tmp_path / "control_sd.pth"
            torch.save(original, path)
    own = loaded(path)
    inputs = inputs_for(own.config)
    expected = residuals(reference, inputs, 0.7)
    got = made(own, inputs, torch.full((1, len(expected)), 0.7))
    assert all(float(tensor.abs().max()) > 0.01 for tensor in expected)
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 1e-5
    checkpoint = load_checkpoint(path)
    assert (checkpoint.family, checkpoint.kind) == (family, "control")


@pytest.mark.parametrize(("kinds", "layout"), [(6, "folder"), (6, "file"), (8, "file")])
def test_one_for_several_kinds_computes_what_diffusers_does(tmp_path: Path, kinds: int, layout: str) -> None:
    """Xinsir's union (six kinds) and ProMax (eight), whose files are in diffusers' layout; rows of one picture."""
    union = {"num_control_type": kinds, "num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 4}
    reference = controlnet(1, union=True, **settings("sdxl"), **union)
    path = tmp_path / "diffusion_pytorch_model_promax.safetensors"
    if layout == "folder":
        reference.save_pretrained(path.with_suffix(""))
        path = path.with_suffix("")
    else:
        save_file({name: tensor.clone() for name, tensor in reference.state_dict().items()}, path)
    own = loaded(path)
    assert isinstance(own, ControlNetUnion) and load_checkpoint(path).family == "sdxl"
    given = inputs_for(own.config)
    rows = {name: tensor[:1].expand(2, *tensor.shape[1:]) for name, tensor in given.items()}
    rows["encoder_hidden_states"] = given["encoder_hidden_states"]
    pictures = [torch.rand(1, 3, 88, 64).expand(2, -1, -1, -1) for _ in range(2)]
    results = []
    for modes, scales in (([kinds - 1], [0.7]), ([0, kinds - 1], [0.5, 0.9]), ([0, kinds - 1], [0.5, 0.0])):
        count, one = len(modes), len(modes) == 1
        hot = torch.eye(kinds)[modes][None].expand(2, -1, -1)
        with torch.no_grad():
            down, middle = reference(
                rows["sample"], rows["timestep"], rows["encoder_hidden_states"], pictures[:count], hot.amax(1), modes,
                scales, added_cond_kwargs={name: rows[name] for name in ("text_embeds", "time_ids")}, return_dict=False,
            )  # fmt: skip
            got = own(
                **{**rows, "control_image": torch.stack(pictures[:count], 1)},
                conditioning_scale=torch.full((2, len(down) + 1), scales[0] if one else 1.0),
                control_mode=hot,
                picture_scale=torch.tensor([[1.0] if one else scales]).expand(2, -1),
            )
        for mine, other in zip(got, [*down, middle], strict=True):
            assert float(other.abs().max()) > 0.01
            assert float((mine - other).abs().max() / other.abs().max()) < 1e-5
        results.append(got)
    assert not torch.allclose(results[1][0], results[2][0], atol=1e-3)  # each picture counts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_proj_channel": 16}, "num_trans_channel=32 and num_proj_channel=16 are not supported; supported: 32"),
        ({"addition_embed_type": None}, "that reads no sizes, or pictures in another order than RGB, is not supported"),
    ],
)
def test_one_for_several_kinds_of_another_make_is_refused(change: dict[str, Any], message: str) -> None:
    usual = {**settings("sdxl"), "num_trans_channel": 32, "num_proj_channel": 32}
    with pytest.raises(UnsupportedArchitectureError, match=message):
        ControlNetUnionConfig(**{**usual, **change})


def test_the_original_layout_is_what_diffusers_converts() -> None:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    reference = controlnet(1, **settings("sd1"))
    converted = convert_controlnet_checkpoint(
        prefixed("control_model.", original_controlnet(reference.state_dict())), dict(reference.config)
    )
    state = reference.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


def test_guess_mode_is_a_scale_for_each_residual() -> None:
    reference = controlnet(1, **settings("sd1"))
    own = ControlNet(ControlNetConfig.from_json(dict(reference.config)))
    own.load_state_dict(reference.state_dict())
    inputs = inputs_for(own.config)
    expected = residuals(reference, inputs, 0.5, guess_mode=True)
    for one, other in zip(made(own, inputs, 0.5 * torch.logspace(-1, 0, len(expected))[None]), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("change", [{"global_pool_conditions": True}, {"controlnet_conditioning_channel_order": "bgr"}])
def test_settings_of_a_few_published_ones(change: dict[str, Any]) -> None:
    reference = controlnet(1, **settings("sd1"), **change)
    own = ControlNet(ControlNetConfig.from_json(dict(reference.config)))
    own.load_state_dict(reference.state_dict())
    inputs = inputs_for(own.config)
    expected = residuals(reference, inputs, 1.0)
    for one, other in zip(made(own, inputs, torch.ones(1, len(expected))), expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


def test_the_shuffled_pictures_controlnet_is_known_by_its_name_or_settings(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in controlnet(1, **settings("sd1")).state_dict().items()}
    for stem, yaml, pooled in (("a", None, False), ("v11e_Shuffle", None, True), ("b", "true", True)):
        save_file(state, tmp_path / f"{stem}.safetensors")
        if yaml is not None:
            (tmp_path / f"{stem}.yaml").write_text(f"model:\n  params:\n    global_average_pooling: {yaml.title()}\n")
        assert loaded(tmp_path / f"{stem}.safetensors").config.global_pool_conditions == pooled


def test_a_file_with_the_model_it_was_trained_beside(single_file: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = original_controlnet(controlnet(1, **settings("sd1")).state_dict())
    whole = load_file(single_file("sd1")) | prefixed("control_model.", {k: v.clone() for k, v in state.items()})
    save_file(whole, tmp_path / "control_sd15_canny.safetensors")
    assert load_checkpoint(tmp_path / "control_sd15_canny.safetensors").kind == "control"


def test_what_is_no_tensor_of_it_is_named(tmp_path: Path) -> None:
    state = original_controlnet(controlnet(1, **settings("sd1")).state_dict())
    state = prefixed("control_model.", {name: tensor.clone() for name, tensor in state.items()})
    stray = {**state, "control_model.a.b": torch.ones(1)}
    beside = {**state, "other.c": torch.ones(1)}
    del stray["control_model.zero_convs.1.0.bias"]
    for given, message in ((stray, r"1 missing: zero_convs\.1\.0\.bias; 1 unexpected: a\.b"), (beside, r"other\.c")):
        save_file(given, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "m.safetensors")
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="is a ControlNet, whose averaged weights are not read; export without --ema"):
        load_checkpoint(tmp_path / "m.safetensors", ema=True)
    with pytest.raises(UnsupportedArchitectureError, match="channel_order='gbr' is not supported; supported: rgb, bgr"):
        ControlNetConfig(controlnet_conditioning_channel_order="gbr")


def test_a_bundle_of_the_kind_control(tmp_path: Path) -> None:
    small = {**settings("sd1"), "block_out_channels": (32, 64), "layers_per_block": 1}
    small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    source = write_controlnet(tmp_path / "source", 1, **small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_checkpoint(source, tmp_path / "control")
    bundle = Bundle.open(tmp_path / "control")
    manifest = bundle.manifest
    assert (manifest.kind, manifest.family, manifest.vae.downscale, set(manifest.networks)) == (
        "control", "sd1", 8, {"controlnet"},
    )  # fmt: skip
    spec = manifest.networks["controlnet"]
    assert [spec.shape for spec in spec.outputs][-2:] == [("rows", 64, "height/2", "width/2")] * 2
    report = manifest.parity["controlnet"]
    assert 0 < report["float32"]["max_relative"] <= 1e-4
    assert 0.9995 <= report["float16"]["min_cosine"] < 1
    assert [what for what, _ in verify_against(bundle, str(source))] == [
        "controlnet, float32 against PyTorch", "controlnet, float16 against PyTorch",
    ]  # fmt: skip
    assert (manifest.defaults.height, manifest.defaults.width) == (512, 512)
