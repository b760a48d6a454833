"""A checkpoint's ``scheduler_config.json``, as far as it changes numbers, and the noise schedule it describes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint", "heun"),
    "solver_order": (1, 2),
    "thresholding": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "trained_betas": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Diffusers' settings under diffusers' names; a setting that a solver does not have is ignored by it."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    final_sigmas_type: str = "zero"
    use_karras_sigmas: bool = False
    variance_type: str = "fixed_small"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            value = getattr(self, name, valid[0])
            if value not in valid:
                raise _invalid(name, value)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Self:
        """Read a parsed ``scheduler_config.json``; ``defaults`` are those of the solver that will use it.

        Raises:
            InputError: for a value that is not supported.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        for key, value in values.items():
            if key in CHOICES and key not in names and value not in CHOICES[key]:
                raise _invalid(key, value)
        given = {key: value for key, value in values.items() if key in names and value is not None}
        return cls(**{**(defaults or {}), **given})

    def alphas_cumprod(self) -> NDArray[np.float64]:
        """The signal's share of the variance at each training timestep, (num_train_timesteps,)."""
        count = self.num_train_timesteps
        betas: NDArray[np.float64]
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, count)
        elif self.beta_schedule == "scaled_linear":
            betas = np.square(np.linspace(self.beta_start**0.5, self.beta_end**0.5, count))
        else:
            # Nichol & Dhariwal 2021 (arXiv 2102.09672), equation 17.
            bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            betas = np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(count)])
        alphas: NDArray[np.float64] = np.asarray(np.cumprod(1.0 - betas), np.float64)
        if self.rescale_betas_zero_snr:
            # Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
            root = np.sqrt(alphas)
            alphas = np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))
        return alphas


def _invalid(name: str, value: Any) -> InputError:
    valid = ", ".join(str(choice) for choice in CHOICES[name])
    return InputError(f"the scheduler setting {name}={value!r} is not supported; valid: {valid}")


def spaced_timesteps(config: SchedulerConfig, steps: int) -> NDArray[np.float64]:
    """``steps`` of the training timesteps, falling, as diffusers' DDIM, DDPM and Euler space them, not rounded."""
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1].copy()
    if config.timestep_spacing == "leading":
        return leading_timesteps(config, steps, ratio=count // steps, first=0)
    spaced: NDArray[np.float64] = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
    return spaced


def leading_timesteps(config: SchedulerConfig, steps: int, *, ratio: int, first: int) -> NDArray[np.float64]:
    """``steps`` multiples of ``ratio`` from ``first * ratio`` up, falling, moved by ``steps_offset``.

    Raises:
        InputError: when they repeat or pass the last training timestep.
    """
    spaced = (np.arange(first, first + steps) * ratio)[::-1].astype(np.float64) + config.steps_offset
    if ratio == 0 or spaced[0] > config.num_train_timesteps - 1:
        raise InputError(
            f"num_inference_steps={steps} does not fit 'leading' spacing with steps_offset={config.steps_offset}; "
            "use fewer steps"
        )
    return spaced


def karras_sigmas(low: float, high: float, steps: int, rho: float = 7.0) -> NDArray[np.float64]:
    """Falling noise levels of Karras et al. 2022 (arXiv 2206.00364), equation 5."""
    ramp = np.linspace(0, 1, steps)
    roots: NDArray[np.float64] = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return roots


def sigma_to_timestep(sigma: NDArray[np.float64], log_sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fractional training timestep whose noise level is ``sigma``, linear in its logarithm."""
    return np.interp(np.log(np.maximum(sigma, 1e-10)), log_sigmas, np.arange(len(log_sigmas)))
