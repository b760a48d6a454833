"""PNDM and its multistep part alone, PLMS; Liu et al. 2022 (arXiv 2202.09778)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.solver import Array, NoiseSource, Solver, State, add_scaled, lookup, remember
from calotype.runtime.schedulers.spacing import Steps, whole_timesteps

# The share of each stored prediction, newest first, by how many there are: Adams-Bashforth, equation 12
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class PNDM(Solver):
    """Four predictions are extrapolated to one, which makes DDIM's move.

    The first steps are three of Runge-Kutta, four evaluations each; or, with ``skip_prk_steps``, one evaluation twice:
    the second goes from the first latents again with the mean of both predictions. So do the first two evaluations of
    a run that starts in the middle, as in diffusers, though their timesteps differ there: a step's noise is left.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"set_alpha_to_one", "skip_prk_steps"})
    defaults: ClassVar[Mapping[str, Any]] = {"set_alpha_to_one": False}
    custom: ClassVar[frozenset[str]] = frozenset()  # it counts on equal distances
    memory = 4

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps = whole_timesteps(config, steps)
        distance = config.num_train_timesteps // steps.count
        half = distance // 2
        self._warm_up = 0 if config.skip_prk_steps else 12
        if config.skip_prk_steps:
            visited = np.concatenate([timesteps[:2], timesteps[1:]])
            starts, ends = visited, visited - distance
        else:
            if steps.count < 4:
                raise InputError(f"num_inference_steps={steps.count} is too few for pndm, which warms up with 3; use 4")
            first = np.repeat(timesteps[:3], 4)
            warm_up = np.concatenate([[t, u + half, u + half, u] for t, u in pairwise(timesteps[:4])])
            visited = np.concatenate([warm_up, timesteps[3:]])
            starts = np.concatenate([first, timesteps[3:]])
            ends = np.concatenate([warm_up - np.tile([half, 0], 6), timesteps[3:] - distance])
        self.timesteps = visited.astype(np.float32)
        alphas = self._alphas(visited)
        self._set_levels(np.sqrt(alphas), np.sqrt(1 - alphas))
        self._forward = self._transfers(starts, ends)
        self._again = self._transfers(np.minimum(visited + distance, config.num_train_timesteps - 1), visited)

    def _alphas(self, timesteps: NDArray[np.int64]) -> NDArray[np.float64]:
        table = self.config.alphas_cumprod()
        return lookup(table, timesteps, 1.0 if self.config.set_alpha_to_one else float(table[0]))

    def _transfers(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> list[tuple[float, float]]:
        """Factors of latents and prediction in the latents at ``ends``: equation 9."""
        pairs = zip(self._alphas(starts).tolist(), self._alphas(ends).tolist(), strict=True)
        return [_transfer(now, after, self.config.prediction_type) for now, after in pairs]

    def start_index(self, strength: float) -> int:
        """See :meth:`Solver.start_index`."""
        index = super().start_index(strength)
        if self._warm_up and 0 < index < len(self):
            raise InputError(
                f"strength={strength}: pndm cannot start between its Runge-Kutta steps; set skip_prk_steps or use ddim"
            )
        return index

    def step_ends(self, start: int) -> tuple[int, ...]:
        """See :meth:`Solver.step_ends`. A step of the warm-up takes four evaluations; without, the first takes two."""
        if self._warm_up:
            return (*range(4, self._warm_up + 1, 4), *range(self._warm_up + 1, len(self) + 1))
        return tuple(range(min(start + 2, len(self)), len(self) + 1)) if start < len(self) else ()

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        count = state.steps
        state.steps += 1
        if count < self._warm_up:
            self._step_runge_kutta(state, index, noise_pred, latents)
        elif count == 1 and not self._warm_up:
            np.add(noise_pred, state.history[0], out=state.estimate)
            state.estimate *= 0.5
            _transfer_to(latents, state.saved, state.estimate, self._again[index], state.scratch)
        else:
            if count == 0:
                np.copyto(state.saved, latents)
            remember(state.history, noise_pred)
            shares = ADAMS_BASHFORTH[3 if self._warm_up else min(max(count, 1), 4) - 1]
            np.multiply(state.history[0], shares[0], out=state.estimate)
            for past, share in zip(state.history[1:], shares[1:], strict=False):
                add_scaled(state.estimate, past, share, state.scratch)
            _transfer_to(latents, latents, state.estimate, self._forward[index], state.scratch)

    def _step_runge_kutta(self, state: State, index: int, noise_pred: Array, latents: Array) -> None:
        stage = (state.steps - 1) % 4
        if stage == 0:
            np.copyto(state.saved, latents)
            remember(state.history, noise_pred)
            state.estimate.fill(0)
        add_scaled(state.estimate, noise_pred, RUNGE_KUTTA[stage], state.scratch)
        slope = state.estimate if stage == 3 else noise_pred
        _transfer_to(latents, state.saved, slope, self._forward[index], state.scratch)


def _transfer(alpha: float, following: float, prediction_type: str) -> tuple[float, float]:
    """Factors of latents and prediction in the latents at the level ``following``: equation 9."""
    root = math.sqrt(alpha * (1 - alpha) * following)
    noise = -(following - alpha) / (alpha * math.sqrt(1 - following) + root)
    keep = math.sqrt(following / alpha)
    if prediction_type == "v_prediction":
        return keep + noise * math.sqrt(1 - alpha), noise * math.sqrt(alpha)
    if prediction_type == "sample":
        return keep + noise / math.sqrt(1 - alpha), -noise * math.sqrt(alpha / (1 - alpha))
    return keep, noise


def _transfer_to(latents: Array, start: Array, slope: Array, factors: tuple[float, float], scratch: Array) -> None:
    np.multiply(start, factors[0], out=latents)
    add_scaled(latents, slope, factors[1], scratch)
