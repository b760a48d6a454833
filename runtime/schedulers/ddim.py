"""DDIM; Song et al. 2020 (arXiv 2010.02502), equation 12."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.solver import Move, Solver, lookup
from calotype.runtime.schedulers.spacing import Steps, whole_timesteps


class DDIM(Solver):
    """next = √ᾱ'·clean + √(1-ᾱ'-s²)·noise + s·new noise, where s is 0 at ``eta`` 0."""

    defaults: ClassVar[Mapping[str, Any]] = {"clip_sample": True}
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "clip_sample",
            "clip_sample_range",
            "dynamic_thresholding_ratio",
            "eta",
            "rescale_betas_zero_snr",
            "sample_max_value",
            "set_alpha_to_one",
            "thresholding",
        }
    )

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps = whole_timesteps(config, steps)
        table = config.alphas_cumprod()
        before = timesteps - config.num_train_timesteps // steps.count
        if steps.timesteps is not None:
            before = np.append(timesteps[1:], -1)
        alphas = lookup(table, timesteps, 1.0)
        alphas_before = lookup(table, before, 1.0 if config.set_alpha_to_one else float(table[0]))
        self.timesteps = timesteps.astype(np.float32)
        self._set_levels(np.sqrt(alphas), np.sqrt(1 - alphas))
        pairs = zip(alphas.tolist(), alphas_before.tolist(), self._denoise, strict=True)
        self._set_moves(_move(now, after, denoise, config.eta) for now, after, denoise in pairs)


def _move(alpha: float, alpha_before: float, denoise: tuple[float, float], eta: float) -> Move:
    variance = eta**2 * (1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)
    return move_to(alpha_before, variance, alpha, denoise)


def move_to(signal: float, variance: float, alpha: float, denoise: tuple[float, float]) -> Move:
    """To √signal·clean + √(1-signal-variance)·predicted noise + √variance·new noise, from latents at ``alpha``.

    The predicted noise is (latents - √ᾱ·clean) / √(1-ᾱ), by the clean latents before they are clipped, as in diffusers.
    """
    keep = math.sqrt((1 - signal - variance) / (1 - alpha))
    a, b = denoise
    return Move(
        latents=keep * (1 - math.sqrt(alpha) * a),
        noise_pred=-keep * math.sqrt(alpha) * b,
        denoised=math.sqrt(signal),
        deviation=math.sqrt(variance),
    )
