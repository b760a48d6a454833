"""Guidance: how far a prediction follows the prompt."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arguments import finite, levels, within
from calotype.runtime.errors import InputError, quoted

Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    Attributes:
        scale: prediction = unconditional + scale · (conditional - unconditional); off at 1 and below.
        rescale: 0..1, how far the prediction's deviation is brought back to the conditional one's; Lin et al. 2023
            (arXiv 2305.08891), section 3.4.
        interval: noise levels σ with low < σ ≤ high where guidance is on, elsewhere the conditional prediction stands
            alone and a step costs one row; Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        finite("guidance_scale", self.scale)
        within("guidance_rescale", self.rescale, 0, 1)
        if self.interval is not None:
            low, high = levels("guidance_interval", self.interval)
            if not 0 <= low < high:  # NaN too
                raise InputError(
                    f"guidance_interval={quoted(self.interval)} is no range of noise levels; use 0 <= low < high"
                )

    def active(self, noise_level: float) -> bool:
        """Whether it changes anything at this σ."""
        return self.scale > 1 and (self.interval is None or self.interval[0] < noise_level <= self.interval[1])

    def apply(self, conditional: Array, unconditional: Array) -> None:
        """Turn ``conditional`` into the guided prediction, in place."""
        before = _deviation(conditional) if self.rescale > 0 else 0.0
        conditional -= unconditional
        conditional *= self.scale
        conditional += unconditional
        after = _deviation(conditional) if self.rescale > 0 else 0.0
        if after > 0:
            conditional *= self.rescale * (before / after) + (1 - self.rescale)


def scale_embedding(scale: float, size: int) -> Array:
    """What a UNet distilled with guidance takes instead, (size,): sinusoids of 1000·(scale - 1).

    Meng et al. 2022 (arXiv 2210.03142); Luo et al. 2023, "Latent Consistency Models" (arXiv 2310.04378).
    """
    half = size // 2
    angles = 1000 * (scale - 1) * np.exp(np.arange(half) * (-math.log(10000) / (half - 1)))
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, size % 2)).astype(np.float32)


def _deviation(values: Array) -> float:
    """The standard deviation, without a temporary."""
    flat = values.reshape(-1)
    return math.sqrt(max(float(np.einsum("i,i->", flat, flat)) / flat.size - float(flat.mean()) ** 2, 0.0))
