"""Checkpoints that are pickles: their tensors, and nothing that a pickle could call."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.serialization import safe_globals

from calotype.runtime.errors import CheckpointError

# What the trainers of the originals left beside the weights; none of it is imported or called.
PASSENGERS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


class Passenger:
    """Takes the place of a passenger: whatever it is made of or told is dropped."""

    def __new__(cls, *_: object) -> Self:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.ckpt``, mapped into memory where its format allows it.

    Raises:
        CheckpointError: it is broken, or asks for more than tensors, plain values and known passengers.
    """
    try:
        with safe_globals([(Passenger, name) for name in PASSENGERS]):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what is no pickle, or half of one, can raise anything
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); download it again") from error
        raise CheckpointError(
            f"{path} holds more than tensors, {needed[1]}, which could run code; "
            "fetch this model as .safetensors, or convert it where you can trust it"
        ) from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    state = state if isinstance(state, dict) else {}
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
