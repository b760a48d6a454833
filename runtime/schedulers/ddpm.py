"""DDPM's ancestral sampling; Ho et al. 2020 (arXiv 2006.11239), equations 7 and 11."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig, spaced_timesteps
from calotype.runtime.schedulers.solver import Array, NoiseSource, Solver, State, variance_preserving


class DDPM(Solver):
    """Stochastic: the posterior's mean, and noise of its variance except at the last step."""

    defaults: ClassVar[Mapping[str, Any]] = {"clip_sample": True}

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        timesteps = np.round(spaced_timesteps(config, num_inference_steps)).astype(np.int64)
        alphas = config.alphas_cumprod()[timesteps]
        self.timesteps = timesteps.astype(np.float32)
        self._denoise = variance_preserving(alphas, config.prediction_type)
        self._coefficients = []
        after = [*alphas.tolist()[1:], 1.0]
        for timestep, a, b in zip(timesteps.tolist(), alphas.tolist(), after, strict=True):
            ratio = a / b
            beta = 1 - ratio
            variance = beta if config.variance_type == "fixed_large" else max((1 - b) / (1 - a) * beta, 1e-20)
            deviation = math.sqrt(variance) if timestep > 0 else 0.0
            self._coefficients.append((math.sqrt(b) * beta / (1 - a), math.sqrt(ratio) * (1 - b) / (1 - a), deviation))

    def step(self, state: State, index: int, model_output: Array, sample: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        denoised = self._to_denoised(state, index, model_output, sample)
        if self.config.clip_sample:
            limit = self.config.clip_sample_range
            np.clip(denoised, -limit, limit, out=denoised)
        clean, current, deviation = self._coefficients[index]
        sample *= current
        denoised *= clean
        sample += denoised
        if deviation > 0:
            rng.standard_normal(dtype=np.float32, out=state.scratch)
            state.scratch *= deviation
            sample += state.scratch
