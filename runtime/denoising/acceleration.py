"""Accelerated mode: what of a picture's making is left out, and what takes its place."""

from __future__ import annotations

import dataclasses
from typing import Any

from calotype.runtime.arguments import at_least, finite, levels, text
from calotype.runtime.bundle.form import Form
from calotype.runtime.errors import InputError, quoted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceleration:
    """How much less is computed than exactly; without settings, nothing.

    Attributes:
        steps: the share of the model's own number of steps that is taken; a call that says how many is followed.
        cache_interval: the whole UNet is evaluated every so many times, and in between its outermost layer alone, on
            the deep feature of the last whole evaluation; Ma et al. 2023, "DeepCache" (arXiv 2312.00858).
        guidance_interval: see :class:`calotype.runtime.denoising.guidance.Guidance`; one that a call gives comes first.
        precision: what the denoising network is computed in: ``float32``, ``float16``, or ``int8``, for which an engine
            of the CPU backend is built; ``auto`` is int8 where such an engine was built and nothing else forbids it.
            None is what the backend is fast in.
    """

    steps: float = 1.0
    cache_interval: int = 1
    guidance_interval: tuple[float, float] | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if not 0 < finite("steps", self.steps) <= 1:
            raise InputError(f"steps={quoted(self.steps)} is no share of a model's steps; use more than 0, up to 1")
        at_least("cache_interval", self.cache_interval, 1)
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", levels("guidance_interval", self.guidance_interval))
        if self.precision is not None and text("precision", self.precision) != "auto":
            object.__setattr__(self, "precision", str(Form.parse(self.precision)))
        if self.precision == "int8" and self.caches:
            raise InputError("cache_interval and precision='int8' exclude each other; use one of them")

    @property
    def caches(self) -> bool:
        """Whether any evaluation is not of the whole UNet."""
        return self.cache_interval > 1


EXACT = Acceleration()
# Measured on talbot (benchmarks/fast.md): at equal cost, fewer steps of a solver of second order stay nearer to the
# exact picture than caching or guidance intervals do, alone or together. int8 strays less (benchmarks.quality.modes).
# Of talbot's seen pairs half the steps find 2.9 points fewer (training/README.md), so it is more than half.
FAST = Acceleration(steps=0.6, precision="auto")


def chosen(fast: Any) -> Acceleration:
    """The acceleration that an argument ``fast`` means: True is ``FAST``, False is ``EXACT``."""
    if isinstance(fast, bool):
        return FAST if fast else EXACT
    if not isinstance(fast, Acceleration):
        raise InputError(f"fast={quoted(fast)} is not known; use True, False or an Acceleration")
    return fast
