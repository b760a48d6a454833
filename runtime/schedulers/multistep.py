"""What the solvers share that extrapolate the predictions of several steps: DPM-Solver, DEIS, UniPC."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.solver import Array, NoiseSource, Solver, State, add_drawn, add_scaled
from calotype.runtime.schedulers.spacing import (
    Levels,
    Steps,
    respaced_sigmas,
    rounded,
    sigma_to_timestep,
    spaced_timesteps_before_last,
    training_sigmas,
)


class Multistep(Solver):
    """Latents are α·clean + σ·noise with α² + σ² = 1; ``sigma`` is σ/α, and λ = -log(sigma)."""

    defaults: ClassVar[Mapping[str, Any]] = {"timestep_spacing": "linspace"}
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "dynamic_thresholding_ratio",
            "lower_order_final",
            "sample_max_value",
            "sigma_spacing",
            "solver_order",
            "solver_type",
            "thresholding",
            "use_beta_sigmas",
            "use_exponential_sigmas",
            "use_karras_sigmas",
        }
    )
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas"})
    # Whether the end is the last of the spaced levels, or the smallest of training; one step tells them apart.
    ends_as_spaced: ClassVar[bool] = False

    def _set_schedule(self, steps: Steps) -> list[float]:
        """Set what each evaluation is given; the noise levels (count + 1) with the one reached last."""
        config = self.config
        table = training_sigmas(config)
        if steps.sigmas is not None:
            timesteps, sigmas = sigma_to_timestep(steps.sigmas[:-1], table), steps.sigmas
        else:
            timesteps = spaced_timesteps_before_last(config, steps)
            levels = np.interp(timesteps, np.arange(len(table)), table)
            if config.sigma_spacing != "table":
                levels = respaced_sigmas(config, steps.count, low=float(table[0]), high=float(table[-1]))
                timesteps = sigma_to_timestep(levels, table)
            sigmas = np.append(levels, self._last_sigma(levels, table))
        sigmas = rounded(sigmas)
        self.timesteps = self._whole(timesteps).astype(np.float32)
        self.num_inference_steps = len(timesteps)  # fewer than asked for where noisy ones are left out
        alphas = 1 / np.sqrt(sigmas[:-1] ** 2 + 1)
        self._set_levels(alphas, sigmas[:-1] * alphas)
        # noise = a·latents + b·output, where it is not taken from thresholded clean latents
        rows = zip(self._levels, self._denoise, strict=True)
        self._noising = [((1 - signal * a) / sigma, -signal * b / sigma) for (signal, sigma), (a, b) in rows]
        return [float(sigma) for sigma in sigmas]

    def _last_sigma(self, levels: Levels, table: Levels) -> float:
        if self.config.final_sigmas_type == "zero":
            return 0.0
        even = self.config.sigma_spacing in ("karras", "exponential", "beta")
        return float(levels[-1] if even and self.ends_as_spaced else table[0])

    def _whole(self, timesteps: Levels) -> Levels:
        """These solvers know whole timesteps only; which they round and which they cut is diffusers' choice."""
        cut = self.config.sigma_spacing in ("exponential", "beta")
        return np.floor(timesteps) if cut else np.round(timesteps)

    def _to_noise(self, state: State, index: int, noise_pred: Array, latents: Array) -> Array:
        """The prediction of the noise, in ``state.estimate``."""
        if self.config.thresholding:
            signal, sigma = self._levels[index]
            estimate = self._to_denoised(state, index, noise_pred, latents)
            estimate *= -signal / sigma
            add_scaled(estimate, latents, 1 / sigma, state.scratch)
            return estimate
        a, b = self._noising[index]
        np.multiply(noise_pred, b, out=state.estimate)
        add_scaled(state.estimate, latents, a, state.scratch)
        return state.estimate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A step as factors: next = latents·keep + predictions, newest first,·weights + new normal noise·deviation."""

    keep: float
    weights: tuple[float, ...]
    deviation: float = 0.0

    def folded(self, a: float, b: float) -> Update:
        """The same with the model's output in place of the newest prediction, a·latents + b·output."""
        newest, *older = self.weights
        return dataclasses.replace(self, keep=self.keep + newest * a, weights=(newest * b, *older))


class Extrapolation(Multistep):
    """A step is one linear combination, of an order that grows with the history; of clean latents or of noise."""

    predicts_noise = False

    def _set_updates(self, sigmas: list[float], lowered_at_end: bool) -> None:
        """The update at each index, for each order up to the highest that is used there."""
        config, count = self.config, len(sigmas) - 1
        self.memory = config.solver_order - 1
        few = config.lower_order_final and count < 15
        self._updates = []
        for index in range(count):
            left = count - index
            highest = 1 if left == 1 and (few or lowered_at_end) else 2 if left == 2 and few else 3
            orders = range(1, min(highest, config.solver_order, index + 1) + 1)
            updates = [self._update(distinct(sigmas[: index + 2], order)) for order in orders]
            if not config.thresholding:
                # In float64: latents times 10,000 less a noise prediction times all but that would keep no digits.
                a, b = (self._noising if self.predicts_noise else self._denoise)[index]
                updates = [update.folded(a, b) for update in updates]
            self._updates.append(updates)

    def _update(self, sigmas: list[float]) -> Update:
        """From the noise levels to reach, at hand, and of the history, in this order."""
        raise NotImplementedError

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        predict = self._to_noise if self.predicts_noise else self._to_denoised
        prediction = predict(state, index, noise_pred, latents)
        updates = self._updates[index]
        update = updates[min(state.steps, len(updates) - 1)]
        latents *= update.keep
        newest = prediction if self.config.thresholding else noise_pred
        add_scaled(latents, newest, update.weights[0], state.scratch)
        for past, weight in zip(state.history, update.weights[1:], strict=False):
            add_scaled(latents, past, weight, state.scratch)
        add_drawn(latents, update.deviation, rng, state.scratch)
        state.history.insert(0, prediction)
        state.estimate = state.history.pop()
        state.steps += 1


def level(sigma: float) -> tuple[float, float, float]:
    """α, σ and λ = log(α/σ) of a noise level."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha, -math.log(sigma) if sigma > 0 else math.inf


def distinct(sigmas: list[float], order: int) -> list[float]:
    """The last ``order`` + 1 levels, newest first, without those before a repeated one: there is no slope to follow."""
    newest = sigmas[::-1][: order + 1]
    repeated = (at for at in range(1, order) if newest[at] == newest[at + 1] or newest[0] == newest[1])
    return newest[: next(repeated, order) + 1]
