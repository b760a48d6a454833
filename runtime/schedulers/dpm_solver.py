"""DPM-Solver++(2M), the second-order multistep solver; Lu et al. 2022 (arXiv 2211.01095), algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.schedulers.config import SchedulerConfig, karras_sigmas, leading_timesteps, sigma_to_timestep
from calotype.runtime.schedulers.solver import Array, NoiseSource, Solver, State, variance_preserving

# next = sample·s + clean·a + previous clean·b
Coefficients = tuple[float, float, float]


class DPMSolverMultistep(Solver):
    """A step is one linear combination of the latents and the last two predictions of the clean ones."""

    defaults: ClassVar[Mapping[str, Any]] = {"timestep_spacing": "linspace"}

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        alphas = config.alphas_cumprod()
        if config.rescale_betas_zero_snr:
            alphas[-1] = 2.0**-24
        table = np.sqrt((1 - alphas) / alphas)
        timesteps = _timesteps(config, num_inference_steps)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if config.use_karras_sigmas:
            sigmas = karras_sigmas(float(table[0]), float(table[-1]), num_inference_steps)
            timesteps = np.round(sigma_to_timestep(sigmas, np.log(table)))
        last = 0.0 if config.final_sigmas_type == "zero" else float(table[0])
        self.timesteps = timesteps.astype(np.float32)
        self._denoise = variance_preserving(1 / (sigmas**2 + 1), config.prediction_type)
        levels = [*sigmas.tolist(), last]
        self._first = [_first_order(levels, index) for index in range(num_inference_steps)]
        self._second = [
            _second_order(levels, index, config.solver_type) if self._is_second_order(index) else self._first[index]
            for index in range(num_inference_steps)
        ]

    def _is_second_order(self, index: int) -> bool:
        config, steps = self.config, len(self.timesteps)
        stable_end = config.euler_at_final or (config.lower_order_final and steps < 15)
        at_end = index == steps - 1 and (stable_end or config.final_sigmas_type == "zero")
        return config.solver_order == 2 and index > 0 and not at_end

    def step(self, state: State, index: int, model_output: Array, sample: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        denoised = self._to_denoised(state, index, model_output, sample)
        keep, current, previous = (self._second if state.steps > 0 else self._first)[index]
        sample *= keep
        np.multiply(denoised, current, out=state.scratch)
        sample += state.scratch
        if previous != 0:
            np.multiply(state.previous, previous, out=state.scratch)
            sample += state.scratch
        state.denoised, state.previous = state.previous, state.denoised
        state.steps += 1


def _timesteps(config: SchedulerConfig, steps: int) -> NDArray[np.float64]:
    """Diffusers' spacing for this solver: of one step more, the last one left out."""
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.round(np.linspace(0, count - 1, steps + 1))[::-1][:-1].copy()
    if config.timestep_spacing == "leading":
        return leading_timesteps(config, steps, ratio=count // (steps + 1), first=1)
    return np.round(np.arange(count, 0, -count / steps))[:steps] - 1


def _level(sigma: float) -> tuple[float, float, float]:
    """α, σ and λ = log(α/σ) of a noise level."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha, -math.log(sigma) if sigma > 0 else math.inf


def _first_order(sigmas: list[float], index: int) -> Coefficients:
    _, sigma_now, lambda_now = _level(sigmas[index])
    alpha_next, sigma_next, lambda_next = _level(sigmas[index + 1])
    return sigma_next / sigma_now, -alpha_next * math.expm1(lambda_now - lambda_next), 0.0


def _second_order(sigmas: list[float], index: int, solver_type: str) -> Coefficients:
    keep, current, _ = _first_order(sigmas, index)
    alpha_next, _, lambda_next = _level(sigmas[index + 1])
    lambda_now, lambda_before = _level(sigmas[index])[2], _level(sigmas[index - 1])[2]
    step = lambda_next - lambda_now
    if lambda_now == lambda_before or step == 0:
        return keep, current, 0.0  # two steps rounded to one timestep: there is no slope to follow
    ratio = (lambda_now - lambda_before) / step
    slope = current / 2 if solver_type == "midpoint" else alpha_next * (math.expm1(-step) / step + 1)
    return keep, current + slope / ratio, -slope / ratio
