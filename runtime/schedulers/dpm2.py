"""DPM-Solver-2, and with ancestral noise; Lu et al. 2022 (arXiv 2206.00927), algorithm 1, over sigma as k-diffusion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.exploding import VarianceExploding, ancestral, straight
from calotype.runtime.schedulers.solver import Array, Move, NoiseSource, State, add_drawn, add_scaled
from calotype.runtime.schedulers.spacing import Levels, Steps, sigma_to_timestep, training_sigmas


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """From ``sigma`` over ``middle`` to ``down``, and up again by noise of the deviation ``up``."""

    sigma: float
    middle: float
    down: float
    up: float = 0.0

    def moves(self) -> tuple[Move, Move]:
        """To the middle; and, from there, what is added to the latents that the step began with."""
        slope = (self.down - self.sigma) / self.middle
        return straight(self.sigma, self.middle), Move(latents=slope, denoised=-slope, deviation=self.up)


class DPM2(VarianceExploding):
    """The slope at the geometric middle of two noise levels leads all the way; the last step is Euler's."""

    defaults: ClassVar[Mapping[str, Any]] = {**VarianceExploding.defaults, "beta_start": 0.00085, "beta_end": 0.012}
    evaluations_per_step: ClassVar[int] = 2

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps, sigmas = self._schedule(steps)
        if config.sigma_spacing == "karras":
            timesteps = np.round(timesteps)
        *pairs, (sigma, last) = pairwise(sigmas.tolist())
        taken = [self._step(now, after) for now, after in pairs]
        middles = np.array([step.middle for step in taken])
        between = sigma_to_timestep(middles, training_sigmas(config))
        self._set_evaluations(_interleave(timesteps, between), _interleave(sigmas[:-1], middles))
        self._set_moves([*(move for step in taken for move in step.moves()), straight(sigma, last)])

    def _step(self, sigma: float, following: float) -> Step:
        return Step(sigma=sigma, middle=math.sqrt(sigma * following), down=following)

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        move = self._moves[index]
        if index % 2 == 0:
            np.copyto(state.saved, latents)
            latents *= move.latents
        else:
            latents *= move.latents
            latents += state.saved  # before the rest: the two may all but cancel, and what is left is rounded finely
        add_scaled(latents, noise_pred, move.noise_pred, state.scratch)
        add_drawn(latents, move.deviation, rng, state.scratch)


class DPM2Ancestral(DPM2):
    """Each step goes further down than needed, and noise leads up again."""

    def _step(self, sigma: float, following: float) -> Step:
        down, up = ancestral(sigma, following)
        return Step(sigma=sigma, middle=math.sqrt(sigma * down), down=down, up=up)


def _interleave(firsts: Levels, seconds: Levels) -> Levels:
    """First and second evaluation of each step in turn; the last step has one."""
    both = np.empty(len(firsts) + len(seconds))
    both[::2], both[1::2] = firsts, seconds
    return both
