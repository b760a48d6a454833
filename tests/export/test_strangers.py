"""Models of other kinds, by the names and shapes that their publishers' files have; nothing of their size is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calotype.export.contents import read_tensors
from calotype.export.quantised import plain
from calotype.export.single_file import SingleFile
from calotype.export.sources import load_checkpoint, load_file
from calotype.runtime.errors import UnsupportedArchitectureError
from tests.export.original_layout import prefixed

SUPPORTED = "; supported: "


def unet(channels: int, context: int, *, linear: bool = True, pooled: int | None = None) -> dict[str, Tensor]:
    """The tensors of a UNet in the original layout that tell what it is."""
    state = {
        "input_blocks.0.0.weight": torch.empty(320, channels, 3, 3, device="meta"),
        "input_blocks.1.1.proj_in.weight": torch.empty(320, 320, *[] if linear else [1, 1], device="meta"),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(320, context, device="meta"),
    }
    if pooled is not None:
        state["label_emb.0.0.weight"] = torch.empty(1280, pooled, device="meta")
    return prefixed("model.diffusion_model.", state)


def openclip(prefix: str, width: int) -> dict[str, Tensor]:
    return prefixed(
        prefix,
        {
            "token_embedding.weight": torch.empty(49408, width, device="meta"),
            "positional_embedding": torch.empty(77, width, device="meta"),
            "ln_final.bias": torch.empty(width, device="meta"),
            "text_projection": torch.empty(width, width, device="meta"),
        },
    )


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.empty(1, device="meta") for name in names}


SD2_TEXT = openclip("cond_stage_model.model.", 1024)
# What is left of the text half in the OpenCLIP and CLIP whose image half encodes the picture.
UNCLIP = SD2_TEXT | named("embedder.model.visual.proj", "noise_augmentor.data_std")
UNCLIP_H, UNCLIP_L = (UNCLIP | openclip("embedder.model.", width) for width in (1024, 768))
DEPTH = SD2_TEXT | named("depth_model.model.pretrained.model.cls_token", "depth_model.model.scratch.layer1_rn.weight")
UPSCALER = SD2_TEXT | named("model.diffusion_model.label_emb.weight", "low_scale_model.betas")
VIDEO = openclip("conditioner.embedders.0.open_clip.model.", 1024) | named(
    "model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight",
    "model.diffusion_model.input_blocks.1.1.time_mixer.mix_factor",
)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (unet(4, 1024, pooled=2048) | UNCLIP_H, "Stable unCLIP, which reads a picture"),
        (unet(4, 1024, pooled=1536) | UNCLIP_L, "Stable unCLIP, which reads a picture"),
        (unet(4, 1024, pooled=2048), "Stable unCLIP, which reads a picture"),
        (unet(4, 1280, pooled=2560) | openclip("conditioner.embedders.0.model.", 1280), "the SDXL refiner"),
        (unet(4, 1280, pooled=2560), "the SDXL refiner"),
        (unet(8, 1024, pooled=768) | VIDEO, "Stable Video Diffusion"),
        (unet(5, 1024) | DEPTH, "a depth-to-image model, whose UNet reads 5 channels"),
        (unet(5, 1024), "a depth-to-image model"),
        (unet(7, 1024) | UPSCALER, "an upscaler of pictures, whose UNet reads 7 channels"),
        (unet(8, 768, linear=False), "a model that edits or turns a picture"),
        (named("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), r"an upscaler of pictures \(as ESRGAN\)"),
        (named("conv_first.weight", "body.0.rdb1.conv1.weight"), r"an upscaler of pictures \(as ESRGAN\)"),
        (named("body.0.weight", "body.1.weight", "body.2.bias"), r"an upscaler of pictures \(as ESRGAN\)"),
        (named("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"), "FLUX.2's transform"),
        (named("model.diffusion_model.double_blocks.0.img_mod.lin.weight"), "FLUX.1"),
        (named("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
        (named("noise_refiner.0.attention.qkv.weight", "cap_embedder.0.weight"), "Z-Image"),
        (named("transformer_blocks.0.img_mod.1.weight", "txt_in.weight"), "Qwen-Image"),
        (
            named("style_embedding", "transformer_layes.0.attn.in_proj_weight"),
            "a T2I-Adapter of style, which reads what",
        ),
    ],
)
def test_a_model_of_another_kind_is_named(state: dict[str, Tensor], what: str) -> None:
    file = SingleFile(path=Path("model.safetensors"), state=state, metadata={})
    with pytest.raises(UnsupportedArchitectureError, match=f"^model.safetensors holds {what}.*{SUPPORTED}") as caught:
        load_file(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrapper", ["params_ema", "params", None])
def test_an_upscaler_as_it_is_published_is_named(tmp_path: Path, wrapper: str | None) -> None:
    state = {"conv_first.weight": torch.ones(64, 3, 3, 3), "body.0.rdb1.conv1.weight": torch.ones(32, 64, 3, 3)}
    torch.save(state if wrapper is None else {wrapper: state}, tmp_path / "RealESRGAN_x4plus.pth")
    assert read_tensors(tmp_path / "RealESRGAN_x4plus.pth")[0].keys() == state.keys()
    with pytest.raises(UnsupportedArchitectureError, match="holds an upscaler of pictures"):
        load_checkpoint(tmp_path / "RealESRGAN_x4plus.pth")


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("endings", "library"),
    [
        (("qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up", "bias"), "SVDQuant"),
        (("qweight", "wscales", "smooth", "smooth_orig", "lora_down", "lora_up", "bias"), "SVDQuant"),
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
        (("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (("weight", "SCB", "weight_format"), "bitsandbytes"),
        (("weight._data", "weight._scale", "input_scale", "output_scale"), "Quanto"),
    ],
)
def test_a_quantisation_is_named(endings: tuple[str, ...], library: str) -> None:
    state = {f"{ATTENTION}.to_q.{ending}": torch.ones(4) for ending in endings}
    with pytest.raises(
        UnsupportedArchitectureError, match=f"^model.safetensors is quantised by {library}, which is not read; fetch"
    ):
        plain(state, Path("model.safetensors"))
