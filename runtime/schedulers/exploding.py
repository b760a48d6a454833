"""What the solvers share whose latents are clean + sigma·noise; Karras et al. 2022 (arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.schedulers.solver import Array, Move, Solver
from calotype.runtime.schedulers.spacing import (
    Levels,
    Steps,
    respaced_sigmas,
    rounded,
    sigma_to_timestep,
    spaced_timesteps,
    training_sigmas,
)


class VarianceExploding(Solver):
    """The UNet is given the latents divided by √(sigma²+1), which have unit variance."""

    defaults: ClassVar[Mapping[str, Any]] = {"timestep_spacing": "linspace"}
    settings: ClassVar[frozenset[str]] = frozenset(
        {"sigma_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
    )
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas"})

    def _schedule(self, steps: Steps) -> tuple[Levels, Levels]:
        """Timesteps (count,), and noise levels (count + 1,) with the one reached last."""
        config = self.config
        table = training_sigmas(config)
        if steps.sigmas is not None:
            return sigma_to_timestep(steps.sigmas[:-1], table), rounded(steps.sigmas)
        timesteps = spaced_timesteps(config, steps).astype(np.float32).astype(np.float64)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        if config.sigma_spacing != "table":
            sigmas = respaced_sigmas(config, steps.count, low=float(sigmas[-1]), high=float(sigmas[0]))
            timesteps = sigma_to_timestep(sigmas, table)
        last = 0.0 if config.final_sigmas_type == "zero" else float(table[0])
        return timesteps, rounded(np.append(sigmas, last))

    def _set_evaluations(self, timesteps: Levels, sigmas: Levels) -> None:
        """What each evaluation is given, (evaluations,)."""
        self.timesteps = timesteps.astype(np.float32)
        self._set_levels(np.ones_like(sigmas), sigmas)
        self._input_scales = (1 / np.sqrt(sigmas**2 + 1)).tolist()
        highest = float(sigmas.max())
        self.init_noise_sigma = highest if self.config.timestep_spacing != "leading" else math.sqrt(highest**2 + 1)

    def scale_model_input(self, latents: Array, index: int, out: Array) -> None:
        """See :meth:`Solver.scale_model_input`."""
        if out.ndim == latents.ndim:
            np.multiply(latents, self._input_scales[index], out=out)
            return
        np.multiply(latents, self._input_scales[index], out=out[0])
        out[1:] = out[0]  # numpy would allocate a buffer to multiply into several rows at once


def straight(sigma: float, following: float, deviation: float = 0.0) -> Move:
    """Euler's step: latents + (latents - clean) / sigma · (following - sigma)."""
    return Move(latents=following / sigma, denoised=1 - following / sigma, deviation=deviation)


def ancestral(sigma: float, following: float) -> tuple[float, float]:
    """The noise level to step down to, and the deviation of the noise that leads up to ``following`` again."""
    down = following**2 / sigma
    return down, math.sqrt(max(following**2 - down**2, 0.0))
