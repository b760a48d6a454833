"""DDPM's ancestral sampling; Ho et al. 2020 (arXiv 2006.11239), equations 7 and 11."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.solver import Move, Solver, lookup
from calotype.runtime.schedulers.spacing import Steps, whole_timesteps


class DDPM(Solver):
    """Stochastic: the posterior's mean, and noise of its variance except at timestep 0."""

    defaults: ClassVar[Mapping[str, Any]] = {"clip_sample": True}
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "clip_sample",
            "clip_sample_range",
            "dynamic_thresholding_ratio",
            "rescale_betas_zero_snr",
            "sample_max_value",
            "thresholding",
            "variance_type",
        }
    )

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps = whole_timesteps(config, steps)
        alphas = lookup(config.alphas_cumprod(), timesteps, 1.0)
        self.timesteps = timesteps.astype(np.float32)
        self._set_levels(np.sqrt(alphas), np.sqrt(1 - alphas))
        before = [*alphas.tolist()[1:], 1.0]
        self._set_moves(self._move(t, a, b) for t, a, b in zip(timesteps, alphas.tolist(), before, strict=True))

    def _move(self, timestep: int, alpha: float, alpha_before: float) -> Move:
        ratio = alpha / alpha_before
        beta = 1 - ratio
        variance = beta
        if self.config.variance_type != "fixed_large":
            variance = max((1 - alpha_before) / (1 - alpha) * beta, 1e-20)
        return Move(
            latents=math.sqrt(ratio) * (1 - alpha_before) / (1 - alpha),
            denoised=math.sqrt(alpha_before) * beta / (1 - alpha),
            deviation=math.sqrt(variance) if timestep > 0 else 0.0,
        )
