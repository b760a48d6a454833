"""LoKr: a change that is the Kronecker product of a small matrix and a larger one, which may be of low rank.

As in LyCORIS, Yeh et al. 2023 (arXiv 2309.14859).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import numpy as np

from calotype.runtime.adapters.changes import Array, Difference, Module, Shape, shapes, single
from calotype.runtime.adapters.loha import product, product_shape

# A matrix, or what it is the product of.
Factor = tuple[Array] | tuple[Array, Array, Array | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoKr(Difference):
    """What is added to a weight (out, in, …): factor · kron(first, second).

    ``first`` is (out1, in1), ``second`` (out2, in2), (out2, in2 · kh · kw) or (out2, in2, kh, kw).
    """

    first: Factor
    second: Factor
    factor: float

    @classmethod
    def read(cls, module: Module, scale: float) -> Self:
        first, second = _factor(module.parts, "lokr_w1", None), _factor(module.parts, "lokr_w2", "lokr_t2")
        products = [pair for pair in (first, second) if len(pair) > 1]
        rank = (max(products[-1][1].shape[:1], default=1) or 1) if products else None
        return cls(first=first, second=second, factor=scale * module.factor(rank))

    @property
    def shape(self) -> Shape | None:
        first, second = _shape(self.first), _shape(self.second)
        if first is None or second is None or len(first) != 2 or len(second) < 2:
            return None
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def fits(self, shape: Shape) -> bool:
        own = self.shape
        # Where the second is (out2, in2 · kh · kw), the kernel is in the last axis.
        flattened = own is not None and len(own) == 2 and len(shape) > 2
        return super().fits((shape[0], math.prod(shape[1:])) if flattened else shape)

    @property
    def described(self) -> str:
        return shapes(*self.first, *self.second)

    def difference(self) -> Array:
        first, second = _whole(self.first), _whole(self.second)
        first = first.reshape(*first.shape, *(1,) * (second.ndim - 2)) * np.float32(self.factor)
        return np.kron(first, second)


def _factor(parts: Mapping[str, Array], name: str, core: str | None) -> Factor:
    if name in parts:
        return (parts[name],)
    return (parts[f"{name}_a"], parts[f"{name}_b"], parts.get(core) if core else None)


def _shape(factor: Factor) -> Shape | None:
    return factor[0].shape if len(factor) == 1 else product_shape(*factor)


def _whole(factor: Factor) -> Array:
    return single(factor[0]) if len(factor) == 1 else product(*factor)
