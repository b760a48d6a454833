"""What FLUX.2's own code calls the modules of its transformer, as ComfyUI's and most trainers' files do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MODULES = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
}
IN_BLOCKS = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    **{f"attn.to_{side}": f"img_attn.qkv.{side}" for side in "qkv"},
    **{f"attn.add_{side}_proj": f"txt_attn.qkv.{side}" for side in "qkv"},
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
SPLIT = {"up", "down", "alpha"}
_FUSED = re.compile(r"double_blocks[._]\d+[._](img|txt)_attn[._]qkv$")
_LAST = re.compile(r"final_layer[._]adaLN_modulation[._]1$")
_IN_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def flux2_names(module: str) -> list[str]:
    """The names of a module there; of a third of a fused one, see :func:`unpacked`."""
    match = _IN_BLOCK.fullmatch(module)
    if match is None:
        return [MODULES[module]] if module in MODULES else []
    single, number, rest = match.groups()
    known = IN_BLOCKS.get(rest)
    return [] if known is None else [f"{'single' if single else 'double'}_blocks.{number}.{known}"]


def unpacked(modules: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parts of each module of a file, those of the original code that are packed in another way as ours are.

    Fused queries, keys and values become three modules, which share what a low-rank change takes in and have a third
    each of what it gives. The last norm's shift and scale change places, as they do in diffusers' copy of the weights
    (its own reader of LoRAs leaves them). Any other kind of change is left as it is, and matches no module.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, parts in modules.items():
        fused, last = _FUSED.search(name), _LAST.search(name)
        up, count = parts.get("up"), 3 if fused else 2
        if not (fused or last) or up is None or up.ndim < 1 or len(up) % count or not parts.keys() <= SPLIT:
            found[name] = parts
            continue
        shares = [up[number * len(up) // count : (number + 1) * len(up) // count] for number in range(count)]
        if last:
            found[name] = {**parts, "up": np.concatenate(shares[::-1])}
        else:
            between = "." if "." in name else "_"
            found |= {f"{name}{between}{side}": {**parts, "up": own} for side, own in zip("qkv", shares, strict=True)}
    return found
