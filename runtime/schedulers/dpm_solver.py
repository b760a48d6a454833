"""DPM-Solver and DPM-Solver++, multistep, as ODE and SDE; Lu et al. 2022 (arXiv 2206.00927, 2211.01095)."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.multistep import Extrapolation, Multistep, Update, level
from calotype.runtime.schedulers.spacing import Levels, Steps


class DPMSolverMultistep(Extrapolation):
    """Orders 1 to 3; ``++`` extrapolates the clean latents, the others the noise; ``sde`` adds noise in every step."""

    settings: ClassVar[frozenset[str]] = Multistep.settings | {
        "algorithm_type",
        "euler_at_final",
        "final_sigmas_type",
        "lambda_min_clipped",
        "rescale_betas_zero_snr",
        "use_lu_lambdas",
    }

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        # A checkpoint saved with DEIS names that here; diffusers takes the default for it too.
        self._algorithm = "dpmsolver++" if config.algorithm_type == "deis" else config.algorithm_type
        self.predicts_noise = not self._algorithm.endswith("++")
        sigmas = self._set_schedule(steps)
        if self.predicts_noise and sigmas[-1] == 0:
            raise InputError(
                f"algorithm_type={config.algorithm_type!r} cannot reach sigma 0; set final_sigmas_type to 'sigma_min'"
            )
        if self._algorithm == "sde-dpmsolver" and config.solver_order == 3:
            raise InputError("algorithm_type='sde-dpmsolver' has no solver_order=3; valid: 1, 2")
        self._set_updates(sigmas, lowered_at_end=config.euler_at_final or sigmas[-1] == 0)

    def _whole(self, timesteps: Levels) -> Levels:
        logarithmic = self.config.sigma_spacing in ("karras", "lu")
        if logarithmic and self.config.beta_schedule == "squaredcos_cap_v2":
            return np.floor(timesteps)
        return super()._whole(timesteps)

    def _update(self, sigmas: list[float]) -> Update:
        following, now, *past = (level(sigma)[2] for sigma in sigmas)
        step = following - now
        keep, base, deviation = _first_order(self._algorithm, sigmas[0], sigmas[1])
        if not past:
            return Update(keep=keep, weights=(base,), deviation=deviation)
        slope, curve = _higher_order(self._algorithm, sigmas[0], step)
        if len(past) == 1:
            if self.config.solver_type != "heun":
                slope = base / 2
            change = slope / ((now - past[0]) / step)
            return Update(keep=keep, weights=(base + change, -change), deviation=deviation)
        near, far = (now - past[0]) / step, (past[0] - past[1]) / step
        newer = (slope * (1 + near / (near + far)) + curve / (near + far)) / near
        older = -(slope * near + curve) / (near + far) / far
        return Update(keep=keep, weights=(base + newer, older - newer, -older), deviation=deviation)


def _first_order(algorithm: str, following: float, now: float) -> tuple[float, float, float]:
    """Factors of latents and prediction, and the deviation of new noise."""
    alpha, sigma, end = level(following)
    alpha_now, sigma_now, start = level(now)
    step = end - start
    match algorithm:
        case "dpmsolver++":
            return sigma / sigma_now, -alpha * math.expm1(-step), 0.0
        case "sde-dpmsolver++":
            rest = -math.expm1(-2 * step)
            return sigma / sigma_now * math.exp(-step), alpha * rest, sigma * math.sqrt(rest)
        case "dpmsolver":
            return alpha / alpha_now, -sigma * math.expm1(step), 0.0
        case _:
            return alpha / alpha_now, -2 * sigma * math.expm1(step), sigma * math.sqrt(math.expm1(2 * step))


def _higher_order(algorithm: str, following: float, step: float) -> tuple[float, float]:
    """Factors of the prediction's first and second derivative by λ, the latter times 2."""
    alpha, sigma, _ = level(following)
    match algorithm:
        case "dpmsolver++":
            change = math.expm1(-step)
            return alpha * (change / step + 1), -alpha * ((change + step) / step**2 - 0.5)
        case "sde-dpmsolver++":
            change, double = math.expm1(-2 * step), 2 * step
            return alpha * (change / double + 1), -alpha * ((change + double) / double**2 + 0.5)
        case "dpmsolver":
            change = math.expm1(step)
            return -sigma * (change / step - 1), -sigma * ((change - step) / step**2 - 0.5)
        case _:
            return -2 * sigma * (math.expm1(step) / step - 1), 0.0
