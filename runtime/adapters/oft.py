"""OFT: weights that are turned, block by block, and not lengthened.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv 2306.07280). Kohya's and
LyCORIS's turns a layer's outputs, PEFT's its inputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from calotype.runtime.adapters.changes import Array, Module, Shape, flat, shapes, single
from calotype.runtime.adapters.settings import Rotation


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OutputOFT:
    """Blocks (n, size, size) that turn the outputs, and a length for each of them where it was trained too.

    ``limit`` times the number of outputs is how far the blocks may be from none; 0 is no limit.
    """

    blocks: Array
    rescale: Array | None
    limit: float
    scale: float

    @property
    def described(self) -> str:
        return shapes(self.blocks, self.rescale)

    def fits(self, shape: Shape) -> bool:
        square = self.blocks.ndim == 3 and self.blocks.shape[1] == self.blocks.shape[2]
        whole = self.rescale is None or self.rescale.size == shape[0]
        return square and whole and len(shape) > 1 and math.prod(self.blocks.shape[:2]) == shape[0]

    def add_to(self, weight: Array, base: Array) -> None:
        count, size, _ = self.blocks.shape
        turned = cayley(limited_skew(self.blocks, self.limit * len(weight))) - np.eye(size, dtype=np.float32)
        own = flat(base)
        new = np.matmul(turned.swapaxes(1, 2), own.reshape(count, size, -1)).reshape(own.shape)
        new *= np.float32(self.scale)
        if self.rescale is not None:
            new += own
            new *= single(self.rescale).reshape(-1, 1)
            new -= own
        weight += new.reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InputOFT:
    """The upper triangles (n, size · (size - 1) / 2) of what turns the inputs; one that is alone turns all blocks."""

    vectors: Array
    rotation: Rotation
    scale: float

    @classmethod
    def read(cls, module: Module, scale: float) -> Self:
        rotation = Rotation() if module.settings is None else module.settings.rotation
        return cls(vectors=module.parts["oft_R"], rotation=rotation, scale=scale)

    @property
    def described(self) -> str:
        return shapes(self.vectors)

    def fits(self, shape: Shape) -> bool:
        if self.vectors.ndim != 2 or len(shape) < 2:
            return False
        (count, values), size = self.vectors.shape, self._size
        inputs = math.prod(shape[1:])
        return values == size * (size - 1) // 2 and inputs % size == 0 and count in (1, inputs // size)

    def add_to(self, weight: Array, base: Array) -> None:
        size, own = self._size, flat(base)
        turned = self._turned(size) - np.eye(size, dtype=np.float32)
        blocks = own.reshape(len(own), -1, size).swapaxes(0, 1)  # (n, out, size)
        new = np.matmul(blocks, turned.swapaxes(1, 2)).swapaxes(0, 1)
        weight += np.float32(self.scale) * new.reshape(weight.shape)

    @property
    def _size(self) -> int:
        return (1 + math.isqrt(1 + 8 * self.vectors.shape[1])) // 2

    def _turned(self, size: int) -> Array:
        skew = np.zeros((len(self.vectors), size, size))
        skew[(slice(None), *np.triu_indices(size, 1))] = self.vectors
        skew -= skew.swapaxes(1, 2)
        if self.rotation.constrained:
            most = self.rotation.eps / math.sqrt(len(skew))
            length = np.sqrt(np.sum(np.square(skew), axis=(1, 2), keepdims=True))
            skew *= np.minimum(1, most / np.maximum(length, np.finfo(np.float64).tiny))
        if self.rotation.terms is None:
            return cayley(-skew)
        return neumann(skew, self.rotation.terms)


def limited_skew(blocks: Array, most: float) -> Array:
    """``blocks`` (…, size, size) made skew-symmetric, together at most ``most`` long; 0 is no limit."""
    skew = blocks.astype(np.float64)
    skew = skew - skew.swapaxes(-1, -2)
    length = float(np.sqrt(np.sum(np.square(skew)))) + 1e-8
    return skew * (most / length) if 0 < most < length else skew


def cayley(skew: Array) -> Array:
    """The rotations (I + S)(I - S)⁻¹ of skew-symmetric matrices, float32."""
    eye = np.eye(skew.shape[-1])
    return single(np.matmul(eye + skew, np.linalg.inv(eye - skew)))


def neumann(skew: Array, terms: int) -> Array:
    """PEFT's approximation of that, a power series with a half weight on its last term, float32."""
    whole, power = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy(), skew
    if terms > 1:
        whole += 2 * skew
    if terms > 2:
        power = np.matmul(skew, skew)
        whole += 2 * power
        for _ in range(3, terms - 1):
            power = np.matmul(power, skew)
            whole += 2 * power
        whole += np.matmul(power, skew)
    return single(whole)
