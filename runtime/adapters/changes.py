"""What one module of an adapter's file does to one tensor of the model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.adapters.settings import Settings

Array = NDArray[Any]
Shape = tuple[int, ...]
# Writes the rows that are named to an array.
ByRows = Callable[[slice, Array], object]
# Products of one piece, below which OpenBLAS (0.3) computes it in one thread, and its rows.
ALONE, ROWS = 1 << 18, 16


class Change(Protocol):
    """A change of one tensor, already scaled as the user asked."""

    @property
    def described(self) -> str:
        """The shapes that it has, for a message."""

    def fits(self, shape: Shape) -> bool:
        """Whether a tensor of that shape can take it."""

    def add_to(self, weight: Array, base: Array) -> None:
        """Change ``weight``, float32, in place.

        What other adapters did to it does not count: a change that depends on the model's own tensor is given that as
        ``base``, so that the order of adapters does not matter.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """The tensors that a file has for one module, by their parts' names, and what is known of it.

    Attributes:
        name: as in the model.
        scale: how much of it the user wants.
        settings: what PEFT noted beside the file, None for the layouts of others.
    """

    name: str
    parts: Mapping[str, Array]
    scale: float
    settings: Settings | None

    def factor(self, rank: int | None) -> float:
        """What the change is multiplied by as trained: alpha / rank.

        Args:
            rank: as the tensors have it; None where there is no low-rank product, and then alpha says nothing.

        Raises:
            ValueError, OverflowError: alpha is no number that can be used.
        """
        if "alpha" in self.parts:
            factor = float(self.parts["alpha"].item()) / rank if rank else 1.0
        else:
            factor = 1.0 if self.settings is None else self.settings.factor(self.name, rank)
        if "scalar" in self.parts:
            factor *= float(self.parts["scalar"].item())
        if not np.isfinite(factor):
            raise ValueError(f"{self.name} is scaled by {factor}")
        return factor


class Difference(abc.ABC):
    """A change that does not depend on the weight: it is added."""

    @property
    @abc.abstractmethod
    def shape(self) -> Shape | None:
        """The shape of the weights that it is for; None where its tensors do not fit one another."""

    @property
    @abc.abstractmethod
    def described(self) -> str: ...

    @abc.abstractmethod
    def difference(self) -> Array:
        """What is added, float32, of as many values as ``shape`` has."""

    def by_rows(self) -> ByRows | None:
        """What computes some rows of the difference, of as many columns as there are; None where all come at once."""
        return None

    def fits(self, shape: Shape) -> bool:
        """See :class:`Change`; 1×1 convolutions and linear layers are the same to it."""
        return self.shape is not None and trimmed(self.shape) == trimmed(shape)

    def add_to(self, weight: Array, base: Array) -> None:
        weight += self.difference().reshape(weight.shape)


def single(value: Array) -> Array:
    """As float32, which everything is computed in."""
    return value.astype(np.float32)


def flat(value: Array) -> Array:
    """A convolution's or a linear layer's weight as a float32 matrix (first, all others)."""
    return single(value).reshape(len(value), -1)


def matrix_product(left: Array, right: Array, into: Array | None = None) -> Array:
    """``left @ right`` of float32 matrices, written to ``into`` where that is given.

    It goes in pieces that BLAS computes in the thread that asks for them. Whole ones it spreads over threads of its
    own, which then wait for a processor beside those that merge other tensors; half of the time went that way.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    made = np.empty((rows, columns), np.float32) if into is None else into
    width, whole = max(ALONE // (ROWS * max(rank, 1)), 1), rows - rows % ROWS
    for begin in range(0, columns, width):
        part = slice(begin, begin + width)
        into = made[:whole].reshape(whole // ROWS, ROWS, columns)[..., part]
        np.matmul(left[:whole].reshape(whole // ROWS, ROWS, rank), right[:, part], out=into)
        np.matmul(left[whole:], right[:, part], out=made[whole:, part])
    return made


def trimmed(shape: Shape) -> Shape:
    """Without the ones at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def shapes(*arrays: Array | None) -> str:
    """Their shapes, for a message."""
    return " by ".join(str(array.shape) for array in arrays if array is not None)
