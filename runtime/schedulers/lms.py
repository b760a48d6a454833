"""Linear multistep (Adams-Bashforth on uneven noise levels); Liu et al. 2022 (arXiv 2202.09778), section 3.2."""

from __future__ import annotations

import math

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.exploding import VarianceExploding
from calotype.runtime.schedulers.solver import Array, Move, NoiseSource, State, add_scaled
from calotype.runtime.schedulers.spacing import Steps

ORDER = 4
# Two nodes of Gauss and Legendre integrate a cubic exactly.
NODES = (-1 / math.sqrt(3), 1 / math.sqrt(3))


class LMS(VarianceExploding):
    """The slopes d latents / d sigma of up to four steps, as a cubic that is integrated to the next noise level.

    Where a run starts in the middle the missing slopes count as 0, as they do in diffusers.
    """

    memory = ORDER - 1

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps, sigmas = self._schedule(steps)
        self._set_evaluations(timesteps, sigmas[:-1])
        levels = sigmas.tolist()
        # slope = (latents - clean) / sigma, from latents and model output
        self._slopes = [((1 - a) / s, -b / s) for (a, b), s in zip(self._denoise, levels, strict=False)]
        weights = [_weights(levels[max(index - ORDER + 1, 0) : index + 2]) for index in range(len(timesteps))]
        # The newest slope goes into the latents by its factors: it may be all but what it is taken from.
        self._moves = [Move(latents=1.0, denoised=w[0]).folded(*s) for w, s in zip(weights, self._slopes, strict=True)]
        self._older = [w[1:] for w in weights]

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        a, b = self._slopes[index]
        slope = state.estimate
        np.multiply(noise_pred, b, out=slope)
        if a != 0:
            add_scaled(slope, latents, a, state.scratch)
        super().step(state, index, noise_pred, latents, rng)
        for past, weight in zip(state.history, self._older[index], strict=False):
            add_scaled(latents, past, weight, state.scratch)
        state.history.insert(0, slope)
        state.estimate = state.history.pop()


def _weights(sigmas: list[float]) -> list[float]:
    """The integral of each Lagrange polynomial over the last interval, newest first; ``sigmas`` oldest first."""
    *known, end = sigmas
    known.reverse()
    half = (end - known[0]) / 2
    points = [known[0] + half * (1 + node) for node in NODES]
    return [
        half * sum(math.prod((x - other) / (sigma - other) for other in known if other != sigma) for x in points)
        for sigma in known
    ]
