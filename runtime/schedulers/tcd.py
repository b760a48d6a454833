"""Trajectory consistency distillation, gamma sampling; Zheng et al. 2024 (arXiv 2402.19159), algorithm 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.ddim import move_to
from calotype.runtime.schedulers.lcm import DISTILLED_DEFAULTS, distilled_timesteps
from calotype.runtime.schedulers.solver import Solver, lookup
from calotype.runtime.schedulers.spacing import Steps


class TCD(Solver):
    """DDIM's move to a timestep below the next one, the lower the larger ``eta``, and noise that leads up to it."""

    defaults: ClassVar[Mapping[str, Any]] = {**DISTILLED_DEFAULTS, "eta": 0.3}
    settings: ClassVar[frozenset[str]] = frozenset({"eta", "original_inference_steps", "rescale_betas_zero_snr"})

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps = distilled_timesteps(config, steps)
        table = config.alphas_cumprod()
        following = np.append(timesteps[1:], 0)
        # In float32, as diffusers rounds here before it cuts.
        below = np.floor(np.float32(1 - config.eta) * following.astype(np.float32)).astype(np.int64)
        alphas, alphas_below, alphas_next = (lookup(table, at, 1.0) for at in (timesteps, below, following))
        self.timesteps = timesteps.astype(np.float32)
        self._set_levels(np.sqrt(alphas), np.sqrt(1 - alphas))
        variances = 1 - alphas_next / alphas_below
        rows = zip(alphas_next.tolist(), variances.tolist(), alphas.tolist(), self._denoise, strict=True)
        self._set_moves(move_to(*row) for row in rows)
