"""LoHa: a change that is the elementwise product of two low-rank ones.

Hyeon-Woo et al. 2022, "FedPara" (arXiv 2108.06098); as in LyCORIS, Yeh et al. 2023 (arXiv 2309.14859).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from calotype.runtime.adapters.changes import Array, Difference, Module, Shape, flat, matrix_product, shapes, single


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoHa(Difference):
    """What is added to a weight: factor · (a1 @ b1) * (a2 @ b2).

    ``a`` is (out, rank) and ``b`` (rank, in · kh · kw); in the Tucker form, which has a core ``t`` (rank, rank, kh,
    kw), they are (rank, out) and (rank, in).
    """

    pairs: tuple[tuple[Array, Array, Array | None], tuple[Array, Array, Array | None]]
    factor: float

    @classmethod
    def read(cls, module: Module, scale: float) -> Self:
        parts = module.parts
        first = (parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
        second = (parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
        rank = max(first[1].shape[:1], default=1) or 1
        return cls(pairs=(first, second), factor=scale * module.factor(rank))

    @property
    def shape(self) -> Shape | None:
        first, second = (product_shape(*pair) for pair in self.pairs)
        return first if first == second else None

    def fits(self, shape: Shape) -> bool:
        if self.pairs[0][2] is not None:
            return super().fits(shape)
        # The kernel is in the second axis.
        return self.shape is not None and len(shape) > 1 and self.shape == (shape[0], math.prod(shape[1:]))

    @property
    def described(self) -> str:
        return shapes(*self.pairs[0])

    def difference(self) -> Array:
        first, second = (product(*pair) for pair in self.pairs)
        return first * second * np.float32(self.factor)


def product_shape(a: Array, b: Array, t: Array | None) -> Shape | None:
    """The shape of :func:`product`; None where the three do not fit one another."""
    if a.ndim != 2 or b.ndim < 2:
        return None
    if t is None:
        return (a.shape[0], *b.shape[1:]) if a.shape[1] == b.shape[0] else None
    sound = t.ndim > 2 and b.ndim == 2 and t.shape[:2] == (a.shape[0], b.shape[0])
    return (a.shape[1], b.shape[1], *t.shape[2:]) if sound else None


def product(a: Array, b: Array, t: Array | None) -> Array:
    """``a @ b``, or in Tucker's form with its core ``t``."""
    if t is None:
        return matrix_product(single(a), flat(b)).reshape(len(a), *b.shape[1:])
    inner = np.tensordot(single(t), single(b), axes=(1, 0))  # (rank, kh, kw, in)
    return np.moveaxis(np.tensordot(single(a), inner, axes=(0, 0)), -1, 1)  # (out, kh, kw, in) -> (out, in, kh, kw)
