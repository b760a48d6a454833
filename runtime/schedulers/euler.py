"""Euler's method on the probability-flow ODE; Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig, karras_sigmas, sigma_to_timestep, spaced_timesteps
from calotype.runtime.schedulers.solver import Array, NoiseSource, Solver, State, variance_exploding


class Euler(Solver):
    """Latents are clean + sigma·noise here; the UNet is given them divided by √(sigma²+1)."""

    defaults: ClassVar[Mapping[str, Any]] = {"timestep_spacing": "linspace"}

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        alphas = config.alphas_cumprod()
        if config.rescale_betas_zero_snr:
            alphas[-1] = 2.0**-24  # as diffusers: an infinite sigma has no Euler step
        table = np.sqrt((1 - alphas) / alphas)
        timesteps = spaced_timesteps(config, num_inference_steps)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if config.use_karras_sigmas:
            sigmas = karras_sigmas(float(sigmas[-1]), float(sigmas[0]), num_inference_steps)
            timesteps = sigma_to_timestep(sigmas, np.log(table))
        last = 0.0 if config.final_sigmas_type == "zero" else float(table[0])
        self.timesteps = timesteps.astype(np.float32)
        self._sigmas = [*sigmas.tolist(), last]
        self._denoise = variance_exploding(sigmas, config.prediction_type)
        highest = max(self._sigmas)
        self.init_noise_sigma = highest if config.timestep_spacing != "leading" else math.sqrt(highest**2 + 1)

    def scale_model_input(self, sample: Array, index: int, out: Array) -> None:
        """See :meth:`Solver.scale_model_input`."""
        np.multiply(sample, 1 / math.sqrt(self._sigmas[index] ** 2 + 1), out=out)

    def step(self, state: State, index: int, model_output: Array, sample: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        # sample + (sample - clean) / sigma * (next - sigma), without the cancellation at small sigma
        denoised = self._to_denoised(state, index, model_output, sample)
        ratio = self._sigmas[index + 1] / self._sigmas[index]
        sample *= ratio
        denoised *= 1 - ratio
        sample += denoised
