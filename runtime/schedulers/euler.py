"""Euler's method on the probability-flow ODE, and with ancestral noise; Karras et al. 2022 (arXiv 2206.00364)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.exploding import VarianceExploding, ancestral, straight
from calotype.runtime.schedulers.solver import Move
from calotype.runtime.schedulers.spacing import Steps


class Euler(VarianceExploding):
    """Algorithm 2 without churn and without its second-order correction."""

    settings: ClassVar[frozenset[str]] = VarianceExploding.settings | {
        "rescale_betas_zero_snr",
        "final_sigmas_type",
        "sigma_min",
        "sigma_max",
    }

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps, sigmas = self._schedule(steps)
        self._set_evaluations(timesteps, sigmas[:-1])
        self._set_moves(self._move(now, after) for now, after in pairwise(sigmas.tolist()))

    def _move(self, sigma: float, following: float) -> Move:
        return straight(sigma, following)


class EulerAncestral(Euler):
    """Each step goes further down than needed, and noise leads up again."""

    settings: ClassVar[frozenset[str]] = frozenset({"sigma_spacing", "rescale_betas_zero_snr"})

    def _move(self, sigma: float, following: float) -> Move:
        down, up = ancestral(sigma, following)
        return straight(sigma, down, up)
