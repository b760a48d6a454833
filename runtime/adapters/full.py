"""Full differences of weights, biases and norms, and values that take the place of the model's own."""

from __future__ import annotations

import dataclasses

import numpy as np

from calotype.runtime.adapters.changes import Array, Difference, Shape, shapes, single, trimmed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Full(Difference):
    """A tensor that is added as it is, factor times."""

    value: Array
    factor: float

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def described(self) -> str:
        return shapes(self.value)

    def difference(self) -> Array:
        return single(self.value) * np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Replacement:
    """A tensor in place of the model's own, as far as ``scale`` goes."""

    value: Array
    scale: float

    @property
    def described(self) -> str:
        return shapes(self.value)

    def fits(self, shape: Shape) -> bool:
        return trimmed(self.value.shape) == trimmed(shape)

    def add_to(self, weight: Array, base: Array) -> None:
        weight += np.float32(self.scale) * (single(self.value).reshape(weight.shape) - base)
