"""Sampling of latent consistency models; Luo et al. 2023 (arXiv 2310.04378), section 4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.solver import Move, Solver, lookup
from calotype.runtime.schedulers.spacing import Steps, whole_timesteps

SIGMA_DATA = 0.5
DISTILLED_DEFAULTS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class LCM(Solver):
    """Each evaluation jumps to the clean latents, and noise leads back to the next timestep."""

    defaults: ClassVar[Mapping[str, Any]] = DISTILLED_DEFAULTS
    settings: ClassVar[frozenset[str]] = frozenset(
        {
            "clip_sample",
            "clip_sample_range",
            "dynamic_thresholding_ratio",
            "original_inference_steps",
            "rescale_betas_zero_snr",
            "sample_max_value",
            "thresholding",
            "timestep_scaling",
        }
    )

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        timesteps = distilled_timesteps(config, steps)
        alphas = lookup(config.alphas_cumprod(), timesteps, 1.0)
        self.timesteps = timesteps.astype(np.float32)
        self._set_levels(np.sqrt(alphas), np.sqrt(1 - alphas))
        following = [*alphas.tolist()[1:], 1.0]
        self._set_moves(self._move(t, b) for t, b in zip(timesteps.tolist(), following, strict=True))

    def _move(self, timestep: int, following: float) -> Move:
        # The boundary condition: at timestep 0 the latents are the clean ones.
        scaled = timestep * self.config.timestep_scaling
        power = scaled**2 + SIGMA_DATA**2
        signal = math.sqrt(following)
        return Move(
            latents=signal * SIGMA_DATA**2 / power,
            denoised=signal * scaled / math.sqrt(power),
            deviation=math.sqrt(1 - following),
        )


def distilled_timesteps(config: SchedulerConfig, steps: Steps) -> NDArray[np.int64]:
    """Falling timesteps, evenly among the ``original_inference_steps`` that the model was distilled with.

    Raises:
        InputError: when there are more steps than those.
    """
    if steps.timesteps is not None:
        return whole_timesteps(config, steps)
    original = config.original_inference_steps
    if original > config.num_train_timesteps:
        raise InputError(
            f"original_inference_steps={original} is more than num_train_timesteps={config.num_train_timesteps}"
        )
    if steps.count > original:
        raise InputError(
            f"num_inference_steps={steps.count} is more than the original_inference_steps={original} that this "
            "scheduler chooses from; use fewer, 4 is usual"
        )
    trained = (np.arange(original, 0, -1) * (config.num_train_timesteps // original)) - 1
    chosen: NDArray[np.int64] = trained[
        np.floor(np.linspace(0, original, steps.count, endpoint=False)).astype(np.int64)
    ]
    return chosen
