"""Weights that were stored in less than 16 bits: scaled float8 is read, what needs a library of its own is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

# What one weight's scale is called, by its older and its newer writers; the weight is what is stored, times it.
_SCALES = (".scale_weight", ".weight_scale")
# What else goes with it: scales of activations, which only count where one multiplies in float8, and marks.
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_LIBRARIES = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qzeros": "GPTQ or AWQ",
    ".wscales": "SVDQuant",
    "._scale": "Quanto",
}


def plain(state: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """``state`` with every scaled weight multiplied out, in float16, which holds float8's four bits and more.

    Raises:
        CheckpointError: a scale without its weight, or one that does not fit.
        UnsupportedArchitectureError: a quantisation that is not read.
    """
    _refuse_others(state, path)
    scales = {name: suffix for name in state for suffix in _SCALES if name.endswith(suffix)}
    if not scales and not any(name.endswith(_BESIDE) for name in state):
        return state
    found = {name: tensor for name, tensor in state.items() if name not in scales and not name.endswith(_BESIDE)}
    for name, suffix in scales.items():
        weight = f"{name.removesuffix(suffix)}.weight"
        if weight not in found:
            raise CheckpointError(f"{path} has {name} and no {weight}, which it scales; fetch this model in 16 bits")
        found[weight] = _scaled(found[weight], state[name], f"{path}: {name}")
    return found


def _scaled(weight: Tensor, scale: Tensor, what: str) -> Tensor:
    """One scale for all, or one for each row."""
    if scale.numel() not in (1, weight.shape[0]):
        raise UnsupportedArchitectureError(
            f"{what} has {scale.numel()} scales for {weight.shape[0]} rows; supported: one, or one a row"
        )
    factor = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return (weight.float() * factor).to(torch.float16)


def _refuse_others(state: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        for ending, library in _LIBRARIES.items():
            if name.endswith(ending):
                raise UnsupportedArchitectureError(
                    f"{path} is quantised by {library}, which is not read; fetch this model in 16 bits"
                )
        if name.endswith(".comfy_quant"):
            try:
                kind = json.loads(tensor.numpy().tobytes()).get("format")
            except (ValueError, AttributeError):
                kind = None
            if kind not in _FORMATS:
                raise UnsupportedArchitectureError(
                    f"{path} is quantised to {kind or 'an unknown format'}, which is not read; "
                    f"supported: {', '.join(_FORMATS)}; "
                    "fetch this model in 16 bits"
                )
