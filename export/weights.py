"""Weights on disk: read strictly, written once, and pointed at from ONNX graphs."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from calotype.runtime.errors import CheckpointError, ExportError, UnsupportedArchitectureError

# Tensors that real checkpoints carry and no forward pass reads.
STRAY_SUFFIXES = ("position_ids", "num_batches_tracked")
# What diffusers called the autoencoder's attention before 0.14.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

# The dtypes that say what a weight is; of others, a scale or a table is missing.
NUMBERS = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
    """Where a tensor's bytes lie in a ``.safetensors`` file."""

    offset: int
    length: int


def load_module(
    build: Callable[[Config], Module],
    config: Config,
    state: Mapping[str, Tensor],
    what: str,
    table: Mapping[str, str] | None = None,
) -> Module:
    """``build(config)``, ready for inference, with the weights in ``state``, which must be exactly its own.

    They are those very tensors, as they are stored and mapped from their file; :func:`to_float32` makes them numbers to
    compute with. ``table`` maps the beginnings of the module's names to those of another layout, which ``state`` is in.

    Raises:
        CheckpointError: listing what is missing, unexpected or mis-shaped, under the names of ``state``.
        UnsupportedArchitectureError: weights are integers, or floats of four bits.
    """
    with torch.device("meta"):
        module = build(config).requires_grad_(False)
    keys = {name: renamed(name, table or {}) for name in module.state_dict()}
    expected = {keys[name]: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = _modernised(state, expected)
    differences = _differences(expected, given)
    if differences:
        raise CheckpointError(
            f"the {what}'s weights do not match its configuration: {differences}; it is of another kind, or lost "
            "tensors when it was converted: take the publisher's own"
        )
    odd = sorted({str(given[key].dtype).removeprefix("torch.") for key in keys.values()} - NUMBERS)
    if odd:
        raise UnsupportedArchitectureError(
            f"the {what} has weights of the dtype {', '.join(odd)}, which are no numbers by themselves; "
            "fetch this model in 16 bits"
        )
    module.load_state_dict({name: given[key] for name, key in keys.items()}, assign=True)
    return module.eval()


def to_float32(module: nn.Module) -> None:
    """Give ``module`` float32 weights of its own: contiguous, shared with nothing, one after another."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _modernised(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """``state`` without what nobody reads, spelt and shaped as today's libraries write it."""
    given = {_current_name(name): tensor for name, tensor in state.items() if not name.endswith(STRAY_SUFFIXES)}
    if any(name.startswith("text_model.") for name in expected) and not any(
        name.startswith("text_model.") for name in given
    ):
        given = {name if name in expected else f"text_model.{name}": tensor for name, tensor in given.items()}
    # Old autoencoders hold the 1x1 projections of their attention as convolutions.
    return {
        name: tensor.flatten(1) if tensor.ndim == 4 and len(expected.get(name, ())) == 2 else tensor
        for name, tensor in given.items()
    }


def _differences(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> str:
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "mis-shaped": shapes,
    }
    return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)


def renamed(name: str, table: Mapping[str, str]) -> str:
    """``name`` with its longest dotted beginning that is in ``table`` replaced, or as it is."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:count]))
        if found is not None:
            return ".".join([found, *parts[count:]])
    return name


def write_weights(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Write the state dict of a float32 module in ``dtype``, and round the module's own weights to it."""
    for name, tensor in module.state_dict().items():
        extremes = torch.stack(torch.aminmax(tensor))
        if not extremes.isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite; the checkpoint is broken: use another")
        if not extremes.to(dtype).isfinite().all():
            raise CheckpointError(f"{name} has values that {dtype} cannot hold; export with --precision fp32")
    module.to(dtype)
    try:
        save_file(module.state_dict(), path, {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path.name} cannot be written: {error}; make room or choose another folder") from error
    module.float()


def locate(path: Path) -> dict[str, Location]:
    """Where each tensor of a ``.safetensors`` file lies (https://github.com/huggingface/safetensors#format)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: Location(offset=8 + length + record["data_offsets"][0], length=_span(record["data_offsets"]))
        for name, record in header.items()
        if name != "__metadata__"
    }


def _span(offsets: list[int]) -> int:
    return offsets[1] - offsets[0]


def _current_name(name: str) -> str:
    if "mid_block.attentions" in name:
        for old, new in OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, the first ones of many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
