"""LoRAs of FLUX.2's transformer, under the names of diffusers, PEFT, kohya's trainers and the original code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.pipeline import Pipeline
from tests.klein import READ
from tests.runtime.references import diffusers_pipeline, psnr

# Modules that have one name in the original code, in every kind of block and outside; the rest of attention has not.
TARGETS = (
    r".*\.(attn\.to_out\.0|attn\.to_add_out|ff\.linear_in|ff_context\.linear_out|attn\.to_qkv_mlp_proj)"
    r"|single_transformer_blocks\.\d+\.attn\.to_out|x_embedder|context_embedder|double_stream_modulation_img\.linear|norm_out\.linear"
)
FUSED = r".*\.attn\.(to_q|to_v|add_k_proj)"
ORIGINAL = (
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out$", r"single_blocks.\1.linear2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"double_stream_modulation_img\.linear", "double_stream_modulation_img.lin"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
)


def original(module: str) -> str:
    for pattern, name in ORIGINAL:
        if re.fullmatch(pattern.removesuffix("$"), module):
            return re.sub(pattern, name, module)
    raise AssertionError(module)


NAMES: Mapping[str, Callable[[str], str]] = {
    "diffusers": lambda module: f"transformer.{module}",
    "peft": lambda module: f"base_model.model.{module}",
    "original": lambda module: f"diffusion_model.{original(module)}",
    "kohya": lambda module: "lora_unet_" + module.replace(".", "_"),
    "kohya, original": lambda module: "lora_unet_" + original(module).replace(".", "_"),
}


@pytest.fixture(scope="module")
def pipeline(klein_bundle: Path) -> Any:
    with Pipeline.load(klein_bundle, "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(klein_checkpoint: Path) -> Any:
    """Diffusers' pipeline with a LoRA in its transformer that PEFT has put there."""
    import peft
    import torch

    found = diffusers_pipeline(klein_checkpoint, "Flux2KleinPipeline")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=f"{TARGETS}|{FUSED}"))
    for name, parameter in found.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    return found


def tensors(theirs: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """By module of the transformer: its two factors."""
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in theirs.transformer.named_parameters():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name)
        if match is not None and re.fullmatch(pattern, match[1]):
            found.setdefault(match[1], {})[match[2]] = parameter.data.clone()
    return found


def written(path: Path, modules: Mapping[str, Mapping[str, Any]], style: str) -> Path:
    """The LoRA as a file in which modules are named in that style."""
    parts = {"A": "lora_down", "B": "lora_up"} if style.startswith("kohya") else {"A": "lora_A", "B": "lora_B"}
    save_file(
        {
            f"{NAMES[style](module)}.{parts[side]}.weight": packed(module, side, tensor, style)
            for module, sides in modules.items()
            for side, tensor in sides.items()
        },
        path,
    )
    return path


def packed(module: str, side: str, tensor: Any, style: str) -> Any:
    """The original code has the last norm's shift before its scale."""
    import torch

    swapped = "original" in style and side == "B" and module == "norm_out.linear"
    return torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor


def drawn(pipeline: Pipeline, lora: Path | None) -> np.ndarray:
    loras = () if lora is None else (Lora(path=lora),)
    latents = np.random.default_rng(0).standard_normal((1, 16, 6, 8), np.float32)
    size = {"height": 24, "width": 32, "num_inference_steps": 3}
    image: np.ndarray = pipeline("a fox", loras=loras, latents=latents, output_type="np", **size).images[0]
    return image


def test_pictures_equal_diffusers_to_50_db(pipeline: Pipeline, theirs: Any, tmp_path: Path) -> None:
    import torch

    lora = written(tmp_path / "lora.safetensors", tensors(theirs, ".*"), "diffusers")
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 16, 6, 8), np.float32))
    wanted = theirs(
        prompt="a fox",
        latents=latents,
        height=24,
        width=32,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="np",
        text_encoder_out_layers=READ,
    ).images[0]
    plain = drawn(pipeline, None)
    assert psnr(drawn(pipeline, lora), wanted) >= 50
    assert psnr(plain, wanted) < 50
    np.testing.assert_array_equal(drawn(pipeline, None), plain)


@pytest.mark.parametrize("style", sorted(NAMES))
def test_every_name_is_known(pipeline: Pipeline, theirs: Any, tmp_path: Path, style: str) -> None:
    modules = tensors(theirs, TARGETS)
    wanted = drawn(pipeline, written(tmp_path / "diffusers.safetensors", modules, "diffusers"))
    got = drawn(pipeline, written(tmp_path / "other.safetensors", modules, style))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "style", ["diffusion_model.double_blocks.0.{}_attn.qkv", "lora_unet_double_blocks_0_{}_attn_qkv"]
)
def test_fused_queries_keys_and_values_are_three_modules(
    pipeline: Pipeline, theirs: Any, tmp_path: Path, style: str
) -> None:
    import torch

    torch.manual_seed(4)
    width = theirs.transformer.inner_dim
    fused, apart = {}, {}
    for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        down, up = torch.randn(3, width) * 0.2, torch.randn(3 * width, 3) * 0.2
        name = style.format(stream)
        fused |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        for module, own in zip(names, up.chunk(3), strict=True):
            place = f"transformer.transformer_blocks.0.attn.{module}"
            apart[f"{place}.lora_A.weight"], apart[f"{place}.lora_B.weight"] = down.clone(), own.clone() * (2 / 3)
    save_file(fused, tmp_path / "fused.safetensors")
    save_file(apart, tmp_path / "apart.safetensors")
    got, wanted = (drawn(pipeline, tmp_path / f"{name}.safetensors") for name in ("fused", "apart"))
    assert psnr(got, wanted) >= 80
    assert psnr(got, drawn(pipeline, None)) < 50
