"""Heun's method, second order with two evaluations a step; Karras et al. 2022 (arXiv 2206.00364), algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.exploding import VarianceExploding
from calotype.runtime.schedulers.solver import Array, NoiseSource, State, add_scaled
from calotype.runtime.schedulers.spacing import Steps


class Heun(VarianceExploding):
    """An Euler step, and from its middle another half with the slope found at its end; the last is Euler's alone."""

    defaults: ClassVar[Mapping[str, Any]] = {**VarianceExploding.defaults, "beta_start": 0.00085, "beta_end": 0.012}
    settings: ClassVar[frozenset[str]] = VarianceExploding.settings | {"clip_sample", "clip_sample_range"}
    evaluations_per_step: ClassVar[int] = 2

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps, sigmas = self._schedule(steps)
        self._set_evaluations(np.repeat(timesteps, 2)[1:], np.repeat(sigmas[:-1], 2)[1:])
        self._ratios = [following / sigma for sigma, following in pairwise(sigmas.tolist())]

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        # A move from sigma to the share r of it: latents·r + clean·(1 - r)
        ratio = self._ratios[index // 2]
        denoised = self._to_denoised(state, index, noise_pred, latents)
        if index % 2 == 0:
            middle = (1 + ratio) / 2
            np.multiply(latents, middle, out=state.saved)
            add_scaled(state.saved, denoised, 1 - middle, state.scratch)
            latents *= ratio
            add_scaled(latents, denoised, 1 - ratio, state.scratch)
        else:
            half = (1 - 1 / ratio) / 2
            latents -= denoised
            latents *= half
            latents += state.saved
