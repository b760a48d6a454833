"""LoRA: a change that is a product of two narrow matrices.

Hu et al. 2021, "LoRA" (arXiv 2106.09685); its convolutions as in LoCon, Yeh et al. 2023 (arXiv 2309.14859).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from calotype.runtime.adapters.changes import (
    Array,
    ByRows,
    Difference,
    Module,
    Shape,
    flat,
    matrix_product,
    shapes,
    single,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Difference):
    """What is added to a weight, (out, in) or (out, in, kh, kw): factor · up · mid · down.

    ``down`` is (rank, in) or (rank, in, kh, kw), ``up`` (out, rank) or (out, rank, 1, 1). ``mid`` is there in LoCon's
    Tucker form: (rank, rank, kh, kw), and ``down`` is 1×1.
    """

    down: Array
    up: Array
    mid: Array | None
    factor: float

    @classmethod
    def read(cls, module: Module, scale: float) -> Self:
        parts = module.parts
        if "embedding_down" in parts:  # PEFT has these the other way round
            down, up = parts["embedding_up"].T, parts["embedding_down"].T
        else:
            down, up = parts["down"], parts["up"]
        rank = max(down.shape[:1], default=1) or 1
        return cls(down=down, up=up, mid=parts.get("mid"), factor=scale * module.factor(rank))

    @property
    def shape(self) -> Shape | None:
        if self.up.ndim < 2 or self.down.ndim < 2 or math.prod(self.up.shape[2:]) != 1:
            return None
        ranks, kernel = (self.up.shape[1], self.down.shape[0]), self.down.shape[2:]
        if self.mid is not None:
            sound = ranks == self.mid.shape[:2] and math.prod(kernel) == 1
            kernel = self.mid.shape[2:]
        else:
            sound = ranks[0] == ranks[1]
        return (self.up.shape[0], self.down.shape[1], *kernel) if sound else None

    @property
    def described(self) -> str:
        return shapes(self.up, self.down)

    def difference(self) -> Array:
        return matrix_product(*self._factors())

    def by_rows(self) -> ByRows:
        up, down = self._factors()
        return lambda rows, into: matrix_product(up[rows], down, into)

    def _factors(self) -> tuple[Array, Array]:
        """Two float32 matrices, whose product is the difference."""
        up, down = flat(self.up) * np.float32(self.factor), single(self.down)
        if self.mid is not None:
            inner = np.tensordot(single(self.mid), flat(down), axes=(1, 0))
            down = np.moveaxis(inner, -1, 1)  # (rank, kh, kw, in) -> (rank, in, kh, kw)
        return up, flat(down)
