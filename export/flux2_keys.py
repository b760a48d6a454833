"""FLUX.2's transformer under the names of its original code, as single files have it: to those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

MARK = "double_stream_modulation_img.lin.weight"
# Before the names, where the file was made for ComfyUI.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MODULES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
FUSED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
LAST = "final_layer.adaLN_modulation.1"
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def is_original(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as in the original code."""
    return any(f"{prefix}{MARK}" in state for prefix in PREFIXES)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names; what is not known keeps its own, for the loader to name."""
    prefix = next(own for own in PREFIXES if f"{own}{MARK}" in state)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found |= _renamed(name.removeprefix(prefix), tensor)
    return found


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    module, _, parameter = name.rpartition(".")
    parameter = "weight" if parameter == "scale" else parameter
    block = _BLOCK.fullmatch(module)
    if module == LAST:  # shift and scale there, scale and shift here
        return {f"norm_out.linear.{parameter}": torch.cat(tensor.chunk(2)[::-1])}
    if block is None:
        return {f"{MODULES[module]}.{parameter}" if module in MODULES else name: tensor}
    kind, number, inner = block.groups()
    place = f"{'single_' if kind == 'single' else ''}transformer_blocks.{number}"
    if kind == "double" and inner in FUSED:
        parts = zip(FUSED[inner], tensor.chunk(3), strict=True)
        return {f"{place}.attn.{own}.{parameter}": part for own, part in parts}
    known = (SINGLE if kind == "single" else DOUBLE).get(inner)
    return {name if known is None else f"{place}.{known}.{parameter}": tensor}
