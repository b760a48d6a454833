"""Diffusers' state dicts in the original single-file layout: the inverse of what the exporter reads, worked out anew.

It counts blocks where the exporter has tables, and `test_single_file.py` holds it against diffusers' own converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

RESNET = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """``layers`` is layers_per_block."""
    return {_unet_name(name, layers, state): tensor for name, tensor in state.items()}


def _unet_name(name: str, layers: int, state: Mapping[str, Tensor]) -> str:
    for new, old in TOP.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old)
    block, kind, index, rest = re.fullmatch(
        r"(?:(?:down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()  # type: ignore[union-attr]
    if kind == "resnets":
        for new, old in RESNET:
            rest = rest.replace(new, old) if rest.startswith(new) else rest
    if name.startswith("mid_block"):
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    first = int(block) * (layers + 1)
    if name.startswith("down_blocks"):
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv.', 'op.')}"
        return f"input_blocks.{first + int(index) + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in state)
        return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
    return f"output_blocks.{first + int(index)}.{int(kind == 'attentions')}.{rest}"


def original_vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Attention as 1×1 convolutions, and the decoder's levels counted from the image."""
    original = {}
    for name, tensor in state.items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for new, old in (
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):
            name = name.replace(new, old)
        original[name] = tensor.contiguous()
    return original


def original_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values fused; the projection as a matrix to multiply with from the right."""
    original: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "self_attn" not in name or "out_proj" in name:
            original[_openclip_name(name)] = tensor.T.contiguous() if name == "text_projection.weight" else tensor
        elif "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            key = _openclip_name(name).replace("q_proj.", "in_proj_")
            original[key] = torch.cat(parts)
    return original


def _openclip_name(name: str) -> str:
    for new, old in (
        ("text_model.", ""),
        ("encoder.layers", "transformer.resblocks"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("final_layer_norm", "ln_final"),
        ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("text_projection.weight", "text_projection"),
    ):
        name = name.replace(new, old)
    return name


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every name with ``prefix`` before it."""
    return {prefix + name: tensor for name, tensor in state.items()}
