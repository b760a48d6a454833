"""Checkpoints that are pickles: their tensors, and nothing that a pickle could call."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.serialization import safe_globals

from calotype.export.weights import listed
from calotype.runtime.errors import CheckpointError

# What the trainers of the originals left beside the weights; none of it is imported or called.
PASSENGERS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# What trainers call the weights among all that they save.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "params_ema", "params")
# What holds the tensors of an IP-Adapter, whose .safetensors have these before their names.
PARTS = ("image_proj", "ip_adapter")


class Passenger:
    """Takes the place of a passenger: whatever it is made of or told is dropped."""

    def __new__(cls, *_: object) -> Self:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, mapped into memory where its format allows it.

    Raises:
        CheckpointError: it is broken, or asks for more than tensors, plain values and known passengers.
    """
    try:
        with safe_globals([(Passenger, name) for name in PASSENGERS]):
            saved = _load(path)
    except Exception as error:  # what is no pickle, or half of one, can raise anything
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise CheckpointError(
                f"{path} cannot be read as tensors ({type(error).__name__}); fetch this model as .safetensors, or "
                "download it again where it was cut off"
            ) from error
        raise CheckpointError(
            f"{path} holds more than tensors, {needed[1]}, which could run code; "
            "fetch this model as .safetensors, or convert it where you can trust it"
        ) from error
    state = _unwrapped(saved)
    if not state:
        has = f"it has {listed(map(str, saved))}" if isinstance(saved, dict) and saved else "it is something else"
        raise CheckpointError(f"{path} holds no tensors by their names; {has}: give the checkpoint itself")
    return state


def _load(path: Path) -> object:
    # PyTorch believes a name that ends in .safetensors; a file without a name it reads for what it is.
    if path.suffix.lower() == ".safetensors":
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _unwrapped(saved: object) -> dict[str, Tensor]:
    """The tensors at the top, or in the first of the places that trainers put them in."""
    if not isinstance(saved, dict):
        return {}
    state = {name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, Tensor)}
    inner = next((saved[name] for name in WRAPPERS if isinstance(saved.get(name), dict)), None)
    if inner is not None:
        return _unwrapped(inner)
    parts = {name: _unwrapped(saved[name]) for name in PARTS if isinstance(saved.get(name), dict)}
    return state | {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
