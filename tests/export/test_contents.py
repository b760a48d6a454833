"""Files that are not what their names say, or that hold something else than 16 or 32 bit weights."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.export.contents import read_tensors
from calotype.export.quantised import plain
from calotype.export.sources import load_checkpoint
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

Maker = Callable[[str], Path]
UNET = "model.diffusion_model."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PLACEHOLDERS = [
    (POINTER, "is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"),
    (b"<!DOCTYPE html>\n<html>", "is a web page, not the file itself; log in"),
    (b"\n<HTML lang=en>", "is a web page, not the file itself"),
    (b'{"error":"Access denied"}', "is a server's error, not the file itself"),
    (b"", "is empty; download it again"),
    (b"GGUF\x03\x00", "holds GGUF weights, which are not read; fetch this model as .safetensors"),
    (b"\x1f\x8b\x08", "is an archive; unpack it"),
    (b"\xfd7zXZ\0\0", "is an archive; unpack it"),
    (b"\x28\xb5\x2f\xfd\0", "is an archive; unpack it"),
    (b"\x89HDF\r\n\x1a\n", "holds weights of Keras, which are not read; fetch this model as .safetensors"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a server's error, not the file itself"),
    (b"ordinary text", r"is of an unknown kind; valid: a folder, \.safetensors, \.ckpt, .*; it begins with b'ordinary"),
]


@pytest.mark.parametrize(("content", "message"), PLACEHOLDERS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.xyz"])
def test_what_stands_in_for_a_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} {message}") as caught:
        load_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "unet/config.json"])
def test_a_pointer_in_a_folder_is_named(copied: Maker, file: str) -> None:
    source = copied("sd1")
    (source / file).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{file} is a pointer of Git LFS"):
        load_checkpoint(source)


@pytest.mark.parametrize("name", ["m.ckpt", "m.CKPT", "m.bin", "m.SafeTensors", "m.safetensors", "m.pth", "m"])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_file_is_read_by_what_it_is(tmp_path: Path, name: str, pickled: bool) -> None:
    state = {"a.weight": torch.arange(3.0)}
    if pickled:
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name, {"modelspec.license": "x"})
    found, metadata = read_tensors(tmp_path / name)
    assert torch.equal(found["a.weight"], state["a.weight"])
    assert metadata == ({} if pickled else {"modelspec.license": "x"})


@pytest.mark.parametrize("name", ["small.CKPT", "small.SafeTensors", "small.bin"])
def test_a_checkpoint_under_another_name_is_the_same_model(single_file: Maker, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(single_file("sd1").read_bytes())
    assert load_checkpoint(tmp_path / name).family == "sd1"
    for missing in ("gone.CKPT", "there/gone.SafeTensors"):
        with pytest.raises(CheckpointError, match=f"{missing} does not exist"):
            load_checkpoint(missing)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module", "params_ema"])
def test_weights_among_what_a_trainer_saved(tmp_path: Path, wrapper: str) -> None:
    state = {"a.weight": torch.arange(3.0)}
    torch.save({"epoch": 3, wrapper: state, "optimizer": {"state": {}}}, tmp_path / "model.ckpt")
    assert torch.equal(read_tensors(tmp_path / "model.ckpt")[0]["a.weight"], state["a.weight"])
    torch.save({"state_dict": {wrapper: state}}, tmp_path / "model.ckpt")
    assert list(read_tensors(tmp_path / "model.ckpt")[0]) == ["a.weight"]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            {"epoch": 3, "optimizer": {}},
            "it has epoch, optimizer: give the checkpoint itself",
        ),
        ([torch.ones(1)], "no tensors by their names; it is something else"),
        ({}, "no tensors by their names; it is something else"),
    ],
)
def test_a_pickle_without_weights_says_what_it_has(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_zip_files_that_hold_no_pickled_tensors_are_named(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        file.writestr("sd/model.safetensors", b"")
    with pytest.raises(CheckpointError, match=f"{name} is an archive; unpack it, and give what is in it$"):
        load_checkpoint(tmp_path / name)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / name))
    with pytest.raises(CheckpointError, match=f"{name} is a program of TorchScript, which is not run; fetch its"):
        load_checkpoint(tmp_path / name)


def scaled(state: dict[str, Tensor], spelt: str, *, rows: bool = False) -> dict[str, Tensor]:
    """The UNet's matrices as ComfyUI stores them: in float8, each with the scale that makes the most of it."""
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not (name.startswith(UNET) and name.endswith(".weight") and tensor.ndim > 1):
            made[name] = tensor
            continue
        axes = tuple(range(1, tensor.ndim)) if rows else tuple(range(tensor.ndim))
        scale = tensor.abs().amax(axes) / 448
        stored = tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1))
        made[name] = stored.to(torch.float8_e4m3fn)
        made[f"{name.removesuffix('.weight')}.{spelt}"] = scale
        if spelt == "scale_weight":
            made[f"{name.removesuffix('.weight')}.scale_input"] = torch.ones(())
        else:
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            made[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
    if spelt == "scale_weight":
        made[f"{UNET}scaled_fp8"] = torch.ones(0, dtype=torch.float8_e4m3fn)
    return made


@pytest.mark.parametrize(("spelt", "rows"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)])
def test_scaled_float8_is_multiplied_out(single_file: Maker, tmp_path: Path, spelt: str, rows: bool) -> None:
    """Reference: the product in float64; float16 holds it to its last bit, float8 the weight to its fourth."""
    plain_state = load_file(single_file("sd1"))
    stored = scaled(plain_state, spelt, rows=rows)
    save_file(stored, tmp_path / "scaled.safetensors")
    unet: Any = load_checkpoint(tmp_path / "scaled.safetensors").components["unet"]
    name = f"{UNET}input_blocks.1.1.proj_in"
    got = unet.down_blocks[0].attentions[0].proj_in.weight.double()
    product = stored[f"{name}.weight"].double() * stored[f"{name}.{spelt}"].double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(got, product, rtol=2**-11, atol=2**-25)
    original = plain_state[f"{name}.weight"].double()
    torch.testing.assert_close(got, original, rtol=2**-4, atol=float(original.abs().max()) * 2**-9)


def test_float8_without_scales_is_the_numbers_it_says(single_file: Maker, tmp_path: Path) -> None:
    state = {name: tensor.to(torch.float8_e5m2) for name, tensor in load_file(single_file("sd1")).items()}
    save_file(state, tmp_path / "float8.safetensors")
    unet: Any = load_checkpoint(tmp_path / "float8.safetensors").components["unet"]
    assert torch.equal(unet.conv_in.weight.float(), state[f"{UNET}input_blocks.0.0.weight"].float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e8m0fnu])
def test_weights_that_are_no_numbers_by_themselves_are_refused(
    single_file: Maker, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Read as numbers, they would make a model that draws nothing but noise."""
    name = f"{UNET}input_blocks.0.0.weight"
    state = load_file(single_file("sd1"))
    save_file(state | {name: state[name].to(dtype)}, tmp_path / "odd.safetensors")
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(UnsupportedArchitectureError, match=rf"weights of the dtype {said}, .* fetch this model in 16"):
        load_checkpoint(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("dtype", ["F6_E2M3", "I4", "\x1b[31m"])
def test_dtypes_that_the_library_does_not_know_are_named(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(6))
    with pytest.raises(UnsupportedArchitectureError, match="holds tensors of a dtype that is not read") as caught:
        read_tensors(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.scale_weight": torch.ones(1)}, r"has a\.scale_weight and no a\.weight"),
        (
            {"a.weight": torch.ones(6, 2), "a.weight_scale": torch.ones(4)},
            r"a\.weight_scale has 4 scales for 6 rows; supported: one, or one a row",
        ),
        (
            {"a.comfy_quant": torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
            "quantised to nvfp4, which is not read; supported: float8_e4m3fn",
        ),
        ({"a.comfy_quant": torch.ones(3)}, "quantised to an unknown format"),
        ({"a.weight": torch.ones(2), "a.weight.absmax": torch.ones(2)}, "quantised by bitsandbytes, .* in 16 bits"),
        ({"a.weight": torch.ones(2), "a.SCB": torch.ones(2)}, "quantised by bitsandbytes"),
        ({"a.qweight": torch.ones(2), "a.qzeros": torch.ones(2)}, "quantised by GPTQ or AWQ"),
    ],
)
def test_other_quantisations_are_named(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plain(state, Path("model.safetensors"))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["edm_vpred.sigma_max", "edm_vpred.sigma_min"], r"an EDM model that predicts velocity \(as CosXL\)"),
        (["edm_mean", "edm_std"], r"an EDM model \(as Playground 2\.5\)"),
        ([f"{UNET}input_blocks.1.2.motion_modules.0.proj_in.weight"], "a motion module"),
    ],
)
def test_a_model_that_needs_more_than_its_unet(single_file: Maker, tmp_path: Path, names: list[str], what: str) -> None:
    save_file(load_file(single_file("sdxl")) | {name: torch.ones(1) for name in names}, tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match=f"holds {what}.*; supported: Stable Diffusion 1"):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_model.model.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.default.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.down.weight", "a LoRA"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "a LoRA"),
        ("down_blocks.0.attentions.0.to_q_lora.up.weight", "a LoRA"),
        ("emb_params", "a textual inversion embedding"),
        ("image_proj.perceiver_resampler.proj_in.weight", "an IP-Adapter FaceID"),
        ("text_model.final_layer_norm.bias", "a text encoder alone"),
        ("input_blocks.0.0.weight", "a UNet without its text encoders"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_what_goes_beside_a_model_is_named(tmp_path: Path, name: str, what: str, ending: str) -> None:
    state = {name: torch.ones(1)}
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.bin")
    with pytest.raises(UnsupportedArchitectureError, match=f"holds {what}"):
        load_checkpoint(tmp_path / f"m.{ending}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "holds a LoRA as PEFT writes it, which is given to calotype generate"),
        ("pytorch_lora_weights.safetensors", "holds a LoRA, which is given to calotype generate"),
        ("learned_embeds.bin", "holds a textual inversion embedding"),
        ("calotype.json", "holds a bundle already"),
        ("v1-5-pruned.ckpt", r"has no model_index\.json, .*; give one of its files itself: .*v1-5-pruned\.ckpt"),
    ],
)
def test_a_folder_of_something_else_is_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_folder_with_another_noise_schedule_is_refused(copied: Maker, kind: str) -> None:
    source = copied("sd1")
    path = source / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": kind}))
    with pytest.raises(UnsupportedArchitectureError, match=f"names the scheduler {kind}, whose noise"):
        load_checkpoint(source)


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickled_weights_of_a_folder_are_read_and_run_nothing(copied: Maker, folder: Maker, component: str) -> None:
    source = copied("sd1")
    (weights,) = (source / component).glob("*.safetensors")
    pickled = source / component / ("diffusion_pytorch_model.bin" if component == "unet" else "pytorch_model.bin")
    torch.save(load_file(weights), pickled)
    weights.unlink()
    one, other = (load_checkpoint(path).components[component].state_dict() for path in (folder("sd1"), source))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    torch.save({"a": Canary(source / "canary")}, pickled)
    with pytest.raises(CheckpointError, match=rf"{pickled.name} holds more than tensors, posix\.mkdir"):
        load_checkpoint(source)
    assert not (source / "canary").exists()
