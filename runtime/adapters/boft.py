"""BOFT: weights that are turned by several stages of blocks, as a butterfly mixes them.

Liu et al. 2024, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (arXiv 2311.06243). LyCORIS's
turns a layer's outputs, PEFT's its inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from calotype.runtime.adapters.changes import Array, Module, Shape, flat, shapes, single
from calotype.runtime.adapters.oft import cayley, limited_skew


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OutputBOFT:
    """Blocks (stages, n, size, size) that turn the outputs, and a length for each of them where it was trained too.

    Of less than the whole, each stage turns that part of the way, as in LyCORIS.
    """

    blocks: Array
    rescale: Array | None
    limit: float
    scale: float

    @property
    def described(self) -> str:
        return shapes(self.blocks, self.rescale)

    def fits(self, shape: Shape) -> bool:
        whole = self.rescale is None or self.rescale.size == shape[0]
        return whole and len(shape) > 1 and _fits(self.blocks, shape[0]) and self.blocks.shape[-1] % 2 == 0

    def add_to(self, weight: Array, base: Array) -> None:
        size = self.blocks.shape[-1]
        eye = np.eye(size, dtype=np.float32)
        turned = eye + np.float32(self.scale) * (cayley(limited_skew(self.blocks, self.limit * len(weight))) - eye)
        own = flat(base)
        new = own
        for stage, blocks in enumerate(turned):
            strides = (-1, 2, 2**stage * (size // 2), own.shape[1])
            mixed = new.reshape(strides).swapaxes(1, 2)
            halves = mixed.shape
            mixed = np.matmul(blocks, mixed.reshape(len(blocks), size, -1)).reshape(halves)
            new = mixed.swapaxes(1, 2).reshape(own.shape)
        if self.rescale is not None:
            new = new * single(self.rescale).reshape(-1, 1)
        weight += (new - own).reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InputBOFT:
    """Blocks (stages, n, size, size) that turn the inputs, and a length (out) for each output."""

    blocks: Array
    lengths: Array
    scale: float

    @classmethod
    def read(cls, module: Module, scale: float) -> Self:
        return cls(blocks=module.parts["boft_R"], lengths=module.parts["boft_s"], scale=scale)

    @property
    def described(self) -> str:
        return shapes(self.blocks, self.lengths)

    def fits(self, shape: Shape) -> bool:
        inputs = int(np.prod(shape[1:]))
        return len(shape) > 1 and self.lengths.size == shape[0] and _fits(self.blocks, inputs)

    def add_to(self, weight: Array, base: Array) -> None:
        _, count, size, _ = self.blocks.shape
        skew = self.blocks.astype(np.float64)
        turned = cayley((skew.swapaxes(-1, -2) - skew) / 2)
        own = flat(base)
        new = own.T
        for stage, blocks in enumerate(turned):
            order = _butterfly(len(new), size, stage)
            sorted_ = np.empty_like(new)
            sorted_[order] = new
            new = np.matmul(blocks, sorted_.reshape(count, size, -1)).reshape(new.shape)[order]
        new = new.T * single(self.lengths).reshape(-1, 1) - own
        weight += np.float32(self.scale) * new.reshape(weight.shape)


def _fits(blocks: Array, width: int) -> bool:
    """Whether ``width`` values can be cut into the blocks, and mixed in as many stages."""
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[1] * blocks.shape[2] != width:
        return False
    stages, count, size = (int(length) for length in blocks.shape[:3])
    # The last stage mixes neighbours of 2**(stages - 1) blocks.
    return stages == 1 or (size % 2 == 0 and 1 < stages <= 32 and count % 2 ** (stages - 1) == 0)


def _butterfly(width: int, size: int, stage: int) -> Array:
    """Where each of ``width`` values comes from before a stage: half blocks in turn, the even ones first."""
    reach = size * 2**stage
    halves = np.arange(reach).reshape(2 * 2**stage if stage else 1, -1)
    order = np.concatenate([halves[0::2], halves[1::2]])
    all_: Array = np.arange(0, width, reach)[:, None] + order.reshape(-1)
    return all_.reshape(-1)
