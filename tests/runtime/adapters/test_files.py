"""What is given as a LoRA and is none, or is one in a way that few trainers write: read, or named in one line."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from calotype.runtime.adapters.lora import Lora, merge
from calotype.runtime.adapters.steps import advice
from calotype.runtime.errors import InputError

Tensors = dict[str, NDArray[Any]]
TEXT = "text_encoder.text_model.encoder.layers.0"
DOWN, UP = np.full((2, 6), 0.5, np.float32), np.full((4, 2), 0.25, np.float32)
PAIR = {"lora_down.weight": DOWN, "lora_up.weight": UP}


def weights() -> dict[str, Tensors]:
    linear: Tensors = {"weight": np.ones((4, 6), np.float32), "bias": np.ones(4, np.float32)}
    text = [
        "text_model.encoder.layers.0.mlp.fc1",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.embeddings.token_embedding",
    ]
    return {
        "unet": {f"{module}.{name}": v for module in ("conv_in", "conv_norm_out") for name, v in linear.items()},
        "text_encoder": {f"{module}.{name}": value for module in text for name, value in linear.items()},
        "text_encoder_2": {"text_projection.weight": linear["weight"]},
    }


def changed(path: Path, scale: float = 1.0) -> list[str]:
    merged = merge([Lora(path=path, scale=scale)], weights())
    return [f"{network}.{name}" for network, own in merged.items() for name in own]


def saved(path: Path, state: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, path, metadata)
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        merge([Lora(path=path)], weights())
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("lora_unet_conv_in", "unet.conv_in.weight"),
        ("lora_unet_input_blocks_0_0", "unet.conv_in.weight"),
        ("lora_unet_out_0", "unet.conv_norm_out.weight"),
        ("lycoris_conv_in", "unet.conv_in.weight"),
        ("oft_unet_conv_in", "unet.conv_in.weight"),
        ("diffusion_model.input_blocks.0.0", "unet.conv_in.weight"),
        ("base_model.model.conv_in", "unet.conv_in.weight"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", f"{TEXT}.mlp.fc1.weight"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", f"{TEXT}.mlp.fc1.weight"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", f"{TEXT}.mlp.fc1.weight"),
        ("text_encoder.encoder.layers.0.mlp.fc1", f"{TEXT}.mlp.fc1.weight"),
        ("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", f"{TEXT}.mlp.fc1.weight"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", f"{TEXT}.mlp.fc1.weight"),
        ("clip_l.text_model.encoder.layers.0.mlp.fc1", f"{TEXT}.mlp.fc1.weight"),
        ("base_model.model.encoder.layers.0.self_attn.q_proj", f"{TEXT}.self_attn.q_proj.weight"),
        ("lora_te2_text_projection", "text_encoder_2.text_projection.weight"),
        ("clip_g.transformer.text_projection", "text_encoder_2.text_projection.weight"),
    ],
)
def test_modules_by_every_name(tmp_path: Path, module: str, place: str) -> None:
    path = saved(tmp_path / "a.safetensors", {f"{module}.{part}": value for part, value in PAIR.items()})
    assert changed(path) == [place]


def test_a_lora_with_norms_and_biases_beside_it(tmp_path: Path) -> None:
    state = {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()}
    state["lora_unet_conv_in.diff_b"] = np.full(4, 2, np.float32)
    state["lora_unet_conv_norm_out.w_norm"] = np.full((4, 6), 3, np.float32)
    state["lora_unet_conv_norm_out.b_norm"] = np.full(4, 4, np.float32)
    merged = merge([Lora(path=saved(tmp_path / "a.safetensors", state), scale=0.5)], weights())["unet"]
    assert {name: float(value.flat[0]) for name, value in merged.items()} == {
        "conv_in.weight": 1 + 0.5 * 0.25,
        "conv_in.bias": 2,
        "conv_norm_out.weight": 2.5,
        "conv_norm_out.bias": 3,
    }


def test_a_bundled_embedding_is_said_and_the_rest_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()}
    for name in ("string_to_param.*", "clip_l", "clip_g"):
        state[f"bundle_emb.cat.{name}"] = np.ones((2, 6), np.float32)
    path = saved(tmp_path / "a.safetensors", state)
    with caplog.at_level(logging.WARNING):
        assert changed(path) == ["unet.conv_in.weight"]
    assert caplog.messages == [
        f"{path} also holds the words cat, which are not used; give their files with --embedding"
    ]


def test_a_scale_that_nothing_states_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()}
    with caplog.at_level(logging.INFO):
        changed(saved(tmp_path / "a.safetensors", state))
        changed(saved(tmp_path / "b.safetensors", state | {"lora_unet_conv_in.alpha": np.array(1.0)}))
    assert caplog.messages == [f"{tmp_path / 'a.safetensors'} does not state its alpha; its rank is taken for it"]


@pytest.mark.parametrize("alpha", [np.nan, np.inf, 1e308])
def test_an_alpha_that_is_no_number(tmp_path: Path, alpha: float) -> None:
    state = {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()}
    path = saved(tmp_path / "a.safetensors", state | {"lora_unet_conv_in.alpha": np.array(alpha)})
    assert "cannot be merged: conv_in is scaled by" in message(path) or "is beyond what float32 holds" in message(path)


def test_rank_0(tmp_path: Path) -> None:
    state = {
        "lora_unet_conv_in.lora_down.weight": np.zeros((0, 6), np.float32),
        "lora_unet_conv_in.lora_up.weight": np.zeros((4, 0), np.float32),
        "lora_unet_conv_in.alpha": np.array(1.0),
    }
    path = saved(tmp_path / "a.safetensors", state)
    assert message(path) == f"{path} has the rank 0 in lora_unet_conv_in, so it changes nothing; use another"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer .*; run: git lfs pull$"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page that was saved in the file's place; down"),
        (b"\n <html>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (b"Entry not found", "is no file of weights but the text 'Entry not found'; download it again$"),
        (b"", "is not a whole safetensors file: it is cut off; download it again$"),
        (b"\0" * 600, "is not a whole safetensors file"),
        (pickle.dumps({"a": 1}), r"is a pickle, which can hold code .* weights_only=True\), 'x.safetensors'\)\"$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected):
        merge([Lora(path=path)], weights())
    message(path)


def test_zip_files_that_hold_no_pickled_tensors_are_named(tmp_path: Path) -> None:
    for inside, expected in (
        ("a.safetensors", "is an archive; unpack it"),
        ("x/constants.pkl", "is a program of Torch"),
    ):
        with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as file:
            file.writestr(inside, b"")
        assert f"x.safetensors {expected}" in message(tmp_path / "x.safetensors")


def test_a_pickle_by_torch_and_a_safetensors_file_of_another_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as file:
        file.writestr("archive/data.pkl", b"")
    assert "is a pickle" in message(tmp_path / "a.bin")
    state = {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()}
    assert changed(saved(tmp_path / "b.bin", state)) == ["unet.conv_in.weight"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.diffusion_model.out.2.weight", "is a whole checkpoint and no LoRA; make a bundle of it"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet and no LoRA"),
        ("lora_controlnet", "is a Control-LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "is an IP-Adapter and no LoRA"),
        ("emb_params", "is a textual inversion and no LoRA; give it with: --embedding"),
        ("base_model.model.conv_in.base_layer.weight", "holds the model with the LoRA in it"),
        ("base_model.model.conv_in.lora_E", "is no LoRA but AdaLoRA"),
        ("base_model.model.conv_in.ia3_l", "is no LoRA but IA3"),
        ("base_model.model.conv_in.glora_A", "is no LoRA but GLoRA"),
        ("conv_in.weight", "1 keys match nothing: conv_in"),
    ],
)  # fmt: skip
def test_other_kinds_of_files_are_named(tmp_path: Path, key: str, expected: str) -> None:
    assert expected in message(saved(tmp_path / "a.safetensors", {key: np.ones((4, 6), np.float32)}))


def test_folders(tmp_path: Path) -> None:
    state = {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()}
    folder = tmp_path / "one"
    folder.mkdir()
    assert "holds no LoRA; valid: a .safetensors file, or a folder with adapter_config.json" in message(folder)
    (folder / "pytorch_lora_weights.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"pytorch_lora_weights\.bin is a pickle"):
        merge([Lora(path=folder)], weights())
    saved(folder / "a.safetensors", state)
    assert changed(folder) == ["unet.conv_in.weight"]
    saved(folder / "b.safetensors", state)
    assert "holds 2 files; give one of them: a.safetensors, b.safetensors" in message(folder)
    saved(folder / "pytorch_lora_weights.safetensors", state)
    assert changed(folder) == ["unet.conv_in.weight"]
    for name in ("style", "face"):
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "adapter_config.json").write_text("{}")
    assert "holds several adapters; give the folder of one: face, style" in message(tmp_path / "two")
    assert "face has no adapter_model.safetensors; download it whole" in message(tmp_path / "two" / "face")
    (tmp_path / "two" / "face" / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle"):
        merge([Lora(path=tmp_path / "two" / "face")], weights())


@pytest.mark.parametrize(
    ("path", "metadata", "expected"),
    [
        ("lcm-lora-sdv1-5/weights.safetensors", {}, "--scheduler lcm --steps 4 and --guidance-scale 1 to 2"),
        ("x/sdxl_lightning_2step_lora.safetensors", {}, "--scheduler euler --timesteps 999,499 and --guidance-scale 1"),
        ("x/Hyper-SD15-3steps-lora.safetensors", {}, "--scheduler ddim --timesteps 999,666,332 and --guidance-scale 1"),
        ("x/dmd2_sdxl_4step_lora_fp16.safetensors", {}, "--scheduler lcm --steps 4 and --guidance-scale 1"),
        ("x/a.safetensors", {"modelspec.title": "My LCM"}, "--scheduler lcm --steps 4 and --guidance-scale 1 to 2"),
        ("x/balcmony.safetensors", {}, None),
        ("x/a.safetensors", {"ss_output_name": "cat"}, None),
    ],
)  # fmt: skip
def test_loras_for_few_steps_say_their_scheduler(path: str, metadata: dict[str, str], expected: str | None) -> None:
    assert advice(Path(path), metadata) == expected


def test_the_scheduler_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "lcm.safetensors", {f"lora_unet_conv_in.{part}": value for part, value in PAIR.items()})
    with caplog.at_level(logging.WARNING):
        changed(path)
    settings = "--scheduler lcm --steps 4 and --guidance-scale 1 to 2"
    assert caplog.messages == [f"{path} is a LoRA for few steps, by its name; draw with {settings}"]
