"""A checkpoint's ``scheduler_config.json``, as far as it changes numbers, and the noise schedule it describes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError, quoted

SPACINGS = ("table", "karras", "exponential", "beta", "lu", "ays-sd1", "ays-sdxl")
# Diffusers says the spacing of the sigmas by one flag for each.
SPACING_FLAGS: Mapping[str, str] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}
COMMON = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    }
)
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (1, 2, 3),
    "sigma_spacing": SPACINGS,
    "time_shift_type": ("exponential", "linear"),
}
LOW, HIGH = 1e-6, 0.999  # of a beta: less is lost when float32 rounds 1 - beta
LEAST_SIGNAL = 1e-12  # a sigma of a million
# What diffusers would do otherwise with these is not implemented, so another value is refused.
FIXED: Mapping[str, Any] = {
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "solver_p": None,
    "invert_sigmas": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Diffusers' settings under diffusers' names, and three of our own.

    Attributes:
        sigma_spacing: one of ``SPACINGS``; ``"table"`` takes the noise levels of the timesteps.
        eta: the share of a stochastic step's noise, 0 to 1 (DDIM, TCD).
        mu: of flow matching with ``use_dynamic_shifting``: how far noise levels are shifted, which diffusers' pipelines
            make of a picture's size.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    skip_prk_steps: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    sigma_spacing: str = "table"
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str = "fixed_small"
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    eta: float = 0.0
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    mu: float | None = None
    shift_terminal: float | None = None
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, fits = _KINDS[str(field.type)]
            if not fits(value):
                raise InputError(f"the scheduler setting {field.name}={quoted(value)} is not {kind}")
            valid = CHOICES.get(field.name)
            if valid is not None and value not in valid:
                raise _invalid(field.name, value, valid)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"the scheduler setting {name}={quoted(value)} is outside {low}..{high}")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise InputError(f"the scheduler settings sigma_min={self.sigma_min} and sigma_max={self.sigma_max} cross")
        betas = self.trained_betas
        if betas is not None and (len(betas) != self.num_train_timesteps or not all(LOW <= b <= HIGH for b in betas)):
            raise InputError(
                f"the scheduler setting trained_betas must hold num_train_timesteps={self.num_train_timesteps} "
                f"numbers within {LOW}..{HIGH}"
            )

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, settings: Collection[str] = ()
    ) -> Self:
        """Read a parsed ``scheduler_config.json``, as diffusers' class for the solver would.

        ``defaults`` are those of the solver; ``settings`` are the names it has beside ``COMMON``: it ignores others.

        Raises:
            InputError: for a value that is of a wrong type, out of range or not supported.
        """
        for name, only in FIXED.items():
            if values.get(name) not in (None, only):
                raise _invalid(name, values[name], (only,))
        read = COMMON.union(settings)
        given = {key: value for key, value in values.items() if key in read and value is not None}
        flags = [flag for flag in SPACING_FLAGS if given.pop(flag, False)]
        if len(flags) > 1 and "sigma_spacing" not in given:
            raise InputError(f"the scheduler settings {' and '.join(flags)} exclude each other; keep one")
        if flags:
            given.setdefault("sigma_spacing", SPACING_FLAGS[flags[0]])
        for name in ("trained_betas", "disable_corrector"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**{**(defaults or {}), **given})

    def alphas_cumprod(self) -> NDArray[np.float32]:
        """The signal's share of the variance at each training timestep, (num_train_timesteps,).

        Rounded to float32 where diffusers rounds: 1 - beta keeps so few digits of a small beta that the smallest
        sigmas of an exact table differ from those a checkpoint's UNet is always run with by 2e-5.
        """
        alphas = np.float32(1) - self._betas()
        table = _cumulative(alphas)
        if table[-1] < LEAST_SIGNAL:
            raise InputError(
                f"the betas leave a signal of {table[-1]:g} at the last training timestep; use smaller ones"
            )
        return _cumulative(_zero_terminal_snr(table)) if self.rescale_betas_zero_snr else table

    def _betas(self) -> NDArray[np.float32]:
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float32)
        if self.beta_schedule == "linear":
            return _linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return np.square(_linspace(self.beta_start**0.5, self.beta_end**0.5, count))
        # Nichol & Dhariwal 2021 (arXiv 2102.09672), equation 17.
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(count)], np.float32)


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """As PyTorch has it: from both ends to the middle, by a step in float32."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(count - 1))
    places = np.arange(count)
    spaced = np.where(places < count // 2, float(first) + step * places, float(last) - step * places[::-1])
    return spaced.astype(np.float32)


def _cumulative(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lin et al. 2023 (arXiv 2305.08891), algorithm 1: 1 - betas whose last signal is nothing."""
    root = np.sqrt(table)
    shifted = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    ratios: NDArray[np.float32] = np.concatenate([shifted[:1], shifted[1:] / shifted[:-1]])
    return np.float32(1) - (np.float32(1) - ratios)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # no NaN


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# What a value must be for each type written above: in words, and as a test.
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "float | None": ("a number", lambda value: value is None or _is_number(value)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "tuple[int, ...]": (
        "a list of whole numbers",
        lambda value: isinstance(value, tuple) and all(map(_is_whole, value)),
    ),
    "tuple[float, ...] | None": (
        "a list of numbers",
        lambda value: value is None or (isinstance(value, tuple) and all(map(_is_number, value))),
    ),
}
_TINY = 1e-12
_RANGES: Mapping[str, tuple[float, float]] = {
    "num_train_timesteps": (2, 1_000_000),
    "beta_start": (LOW, HIGH),
    "beta_end": (LOW, HIGH),
    "steps_offset": (0, 1_000_000),
    "clip_sample_range": (_TINY, math.inf),
    "dynamic_thresholding_ratio": (0, 1),
    "sample_max_value": (_TINY, math.inf),
    "sigma_min": (_TINY, 1e6),
    "sigma_max": (_TINY, 1e6),
    "original_inference_steps": (1, 1_000_000),
    "timestep_scaling": (_TINY, math.inf),
    "eta": (0, 1),
    "shift": (_TINY, 1e6),
    "mu": (-100, 100),
    "shift_terminal": (_TINY, 1 - _TINY),
}


def _invalid(name: str, value: Any, valid: tuple[Any, ...]) -> InputError:
    choices = ", ".join(str(choice) for choice in valid)
    return InputError(f"the scheduler setting {name}={quoted(value)} is not supported; valid: {choices}")
