"""Accelerated mode: what of a picture's making is left out, and what takes its place."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arguments import at_least
from calotype.runtime.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceleration:
    """How much less is computed than exactly; without settings, nothing.

    Attributes:
        steps: the share of the model's own number of steps that is taken; a call that says how many is followed.
        cache_interval: the whole UNet is evaluated every so many times, and in between its outermost layer alone, on
            the deep feature of the last whole evaluation; Ma et al. 2023, "DeepCache" (arXiv 2312.00858).
        guidance_interval: see :class:`calotype.runtime.denoising.guidance.Guidance`; one that a call gives comes first.
        precision: what the UNet is evaluated in. ``int8`` takes an engine of the CPU backend; None is that where one
            was built and nothing else forbids it, else ``float32``, with which a GPU computes as its graphs say.
    """

    steps: float = 1.0
    cache_interval: int = 1
    guidance_interval: tuple[float, float] | None = None
    precision: str | None = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.steps <= 1:
            raise InputError(f"steps={self.steps!r} is no share of a model's steps; use more than 0, up to 1")
        at_least("cache_interval", self.cache_interval, 1)
        if self.precision not in (None, "float32", "int8"):
            raise InputError(f"precision={self.precision!r} is not known; valid: float32, int8, or None")
        if self.precision == "int8" and self.caches:
            raise InputError("cache_interval takes networks that have no engines in int8; use one of the two")

    @property
    def caches(self) -> bool:
        """Whether any evaluation is not of the whole UNet."""
        return self.cache_interval > 1


EXACT = Acceleration()
# Measured on talbot (benchmarks/fast.md): at equal cost, fewer steps of a solver of second order stay nearer to the
# exact picture than caching or guidance intervals do, alone or together. int8 strays less than that (benchmarks.int8).
# Of talbot's seen pairs half the steps find 2.9 points fewer (training/README.md), so it is more than half.
FAST = Acceleration(steps=0.6, precision=None)


def chosen(fast: Any) -> Acceleration:
    """The acceleration that an argument ``fast`` means: True is ``FAST``, False is ``EXACT``."""
    if isinstance(fast, bool):
        return FAST if fast else EXACT
    if not isinstance(fast, Acceleration):
        raise InputError(f"fast={fast!r} is not known; use True, False or an Acceleration")
    return fast


class FeatureCache:
    """The deep feature of one job's last whole evaluation, allocated once; (rows, C, h, w) float32."""

    def __init__(self, interval: int, shape: tuple[int, ...]) -> None:
        self.interval = interval
        self._feature: NDArray[np.float32] = np.zeros(shape, np.float32)
        self._rows = self._age = 0

    def serves(self, rows: int) -> bool:
        """Whether the next evaluation, of ``rows``, can do with it; where guidance sets in it has a row too few."""
        return rows <= self._rows and self._age < self.interval

    def keep(self, feature: NDArray[np.float32]) -> None:
        """Take over what a whole evaluation made."""
        self._rows, self._age = len(feature), 1
        self._feature[: self._rows] = feature

    def give(self, out: NDArray[np.float32]) -> None:
        """Hand it to the next evaluation; the conditional row comes first, and is left where guidance ends."""
        out[:] = self._feature[: len(out)]
        self._age += 1
