"""DDIM at eta 0; Song et al. 2020 (arXiv 2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig, spaced_timesteps
from calotype.runtime.schedulers.solver import Array, NoiseSource, Solver, State, variance_preserving


class DDIM(Solver):
    """Deterministic: next = √ᾱ'·clean + √(1-ᾱ')·noise."""

    defaults: ClassVar[Mapping[str, Any]] = {"clip_sample": True}

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        super().__init__(config, num_inference_steps)
        timesteps = np.round(spaced_timesteps(config, num_inference_steps)).astype(np.int64)
        table = config.alphas_cumprod()
        final = 1.0 if config.set_alpha_to_one else float(table[0])
        before = timesteps - config.num_train_timesteps // num_inference_steps
        alphas = table[timesteps]
        alphas_before = np.where(before >= 0, table[np.maximum(before, 0)], final)
        self.timesteps = timesteps.astype(np.float32)
        self._denoise = variance_preserving(alphas, config.prediction_type)
        # noise = (sample - √ᾱ·clean) / √(1-ᾱ), by the unclipped clean latents, as diffusers does
        self._coefficients = [
            (math.sqrt(a), math.sqrt(1 - a), math.sqrt(b), math.sqrt(1 - b))
            for a, b in zip(alphas.tolist(), alphas_before.tolist(), strict=True)
        ]

    def step(self, state: State, index: int, model_output: Array, sample: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        denoised = self._to_denoised(state, index, model_output, sample)
        signal, noise, next_signal, next_noise = self._coefficients[index]
        np.multiply(denoised, signal, out=state.scratch)
        sample -= state.scratch
        sample *= next_noise / noise
        if self.config.clip_sample:
            limit = self.config.clip_sample_range
            np.clip(denoised, -limit, limit, out=denoised)
        np.multiply(denoised, next_signal, out=state.scratch)
        sample += state.scratch
