"""Which timesteps and noise levels a run of so many steps visits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.schedulers.config import SchedulerConfig

Levels = NDArray[np.float64]
# The ten steps that Sabour et al. 2024 (arXiv 2404.14507) publish for Stable Diffusion 1.5 and SDXL, and their end.
ALIGN_YOUR_STEPS: Mapping[str, tuple[float, ...]] = {
    "ays-sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """How many steps, or exactly which.

    Attributes:
        count: 1 or more.
        timesteps: (count,) falling training timesteps, or None.
        sigmas: (count + 1,) falling noise levels with the one that is reached last, or None.
    """

    count: int
    timesteps: Levels | None = None
    sigmas: Levels | None = None

    @classmethod
    def of(
        cls,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        num_train_timesteps: int,
    ) -> Self:
        """Check what a user asks for.

        Raises:
            InputError: a count that is no whole number or out of range, or lists that do not fall or contradict it.
        """
        if timesteps is not None and sigmas is not None:
            raise InputError("timesteps and sigmas were both given; give one of them")
        times = None if timesteps is None else _falling("timesteps", timesteps, num_train_timesteps - 1)
        levels = None if sigmas is None else _falling("sigmas", sigmas, 1e6)
        if levels is not None and len(levels) < 2:
            raise InputError("sigmas needs the noise level of each step and the last one reached, so 2 or more")
        given = len(times) if times is not None else len(levels) - 1 if levels is not None else None
        count = given if num_inference_steps is None else num_inference_steps
        if not isinstance(count, int | np.integer) or isinstance(count, bool):
            raise InputError(f"num_inference_steps={quoted(count)} is not a whole number")
        if given is not None and given != count:
            raise InputError(
                f"num_inference_steps={quoted(count)}, but the list has {given} steps; leave one of them out"
            )
        if not 1 <= count <= num_train_timesteps:
            raise InputError(
                f"num_inference_steps={quoted(count)} is outside 1..{num_train_timesteps}; "
                f"{min(20, num_train_timesteps)} is a good start"
            )
        return cls(count=int(count), timesteps=times, sigmas=levels)


def _falling(name: str, values: Any, highest: float) -> Levels:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise InputError(f"{name}={quoted(values)} is not a list of finite numbers")
    if (np.diff(array) >= 0).any() or array[-1] < 0 or array[0] > highest:
        raise InputError(f"{name}={quoted(values)} do not fall from at most {highest:g} to at least 0")
    return array


def spaced_timesteps(config: SchedulerConfig, steps: Steps) -> Levels:
    """The training timesteps, falling, as most of diffusers' schedulers space them, not rounded."""
    if steps.timesteps is not None:
        return steps.timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, config.num_train_timesteps - 1, steps.count)[::-1].copy()
    if config.timestep_spacing == "leading":
        return _leading(config, steps.count, ratio=config.num_train_timesteps // steps.count, first=0)
    return _trailing(config, steps.count)


def spaced_timesteps_before_last(config: SchedulerConfig, steps: Steps) -> Levels:
    """The same as diffusers' multistep solvers have them: of one step more, the last left out, and whole."""
    if steps.timesteps is not None:
        return _whole(steps.timesteps)
    # λ = -log(sigma) rises towards the clean end; very noisy timesteps are left out.
    table = -np.log(training_sigmas(config).astype(np.float32))
    count = config.num_train_timesteps - int(np.searchsorted(table[::-1], config.lambda_min_clipped))
    if count == 0:
        raise InputError(f"lambda_min_clipped={config.lambda_min_clipped} leaves no timestep; -5.1 is usual")
    if config.timestep_spacing == "linspace":
        return np.round(np.linspace(0, count - 1, steps.count + 1))[::-1][:-1].copy()
    if config.timestep_spacing == "leading":
        return _leading(config, steps.count, ratio=count // (steps.count + 1), first=1)
    return _trailing(config, steps.count, count)


def whole_timesteps(config: SchedulerConfig, steps: Steps) -> NDArray[np.int64]:
    """The same rounded, for solvers that look their timesteps up in the table."""
    spaced = spaced_timesteps(config, steps) if steps.timesteps is None else _whole(steps.timesteps)
    return np.round(spaced).astype(np.int64)


def _whole(timesteps: Levels) -> Levels:
    if (timesteps % 1 != 0).any():
        raise InputError(f"timesteps={timesteps.tolist()} are looked up by this scheduler; use whole numbers")
    return timesteps


def _trailing(config: SchedulerConfig, steps: int, last: int | None = None) -> Levels:
    count = config.num_train_timesteps
    spaced: Levels = np.round(np.arange(count if last is None else last, 0, -count / steps))[:steps] - 1
    return spaced


def _leading(config: SchedulerConfig, steps: int, *, ratio: int, first: int) -> Levels:
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


def training_sigmas(config: SchedulerConfig) -> Levels:
    """Noise over signal, √((1-ᾱ)/ᾱ), at each training timestep, finite even at zero signal."""
    alphas = config.alphas_cumprod()
    if config.rescale_betas_zero_snr:
        alphas[-1] = 2.0**-24  # as diffusers: no step can be taken from an infinite sigma
    sigmas: Levels = np.sqrt((1 - alphas) / alphas).astype(np.float64)
    return sigmas


def rounded(sigmas: Levels) -> Levels:
    """To float32, as diffusers keeps them: two that only differ by their computation are one."""
    return sigmas.astype(np.float32).astype(np.float64)


def respaced_sigmas(config: SchedulerConfig, steps: int, low: float, high: float) -> Levels:
    """``steps`` falling noise levels by ``config.sigma_spacing`` between ``low`` and ``high``, both included."""
    low = low if config.sigma_min is None else config.sigma_min
    high = high if config.sigma_max is None else config.sigma_max
    if low > high:
        raise InputError(f"sigma_min and sigma_max leave noise levels from {high:g} down to {low:g}; change them")
    ramp = np.linspace(0, 1, steps)
    match config.sigma_spacing:
        case "karras":  # Karras et al. 2022 (arXiv 2206.00364), equation 5
            roots: Levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
            return roots
        case "beta":  # Lee et al. 2024 (arXiv 2407.12173): the quantiles of Beta(0.6, 0.6)
            return low + (high - low) * _beta_quantiles(1 - ramp, 0.6)
        case "exponential":
            return np.exp(np.linspace(math.log(high), math.log(low), steps))
        case "lu":  # Lu et al. 2022 (arXiv 2211.01095): even in λ, which diffusers has in float32 here
            first, last = np.log(np.array([high, low], np.float32)).astype(np.float64)
            levels: Levels = np.exp(first + ramp * (last - first))
            return levels
        case _:
            table = np.log(ALIGN_YOUR_STEPS[config.sigma_spacing])
            marks = np.linspace(0, len(table) - 1, steps + 1)[:-1]
            return np.exp(np.interp(marks, np.arange(len(table)), table))


def _beta_quantiles(shares: Levels, shape: float) -> Levels:
    """The inverse of the distribution function of Beta(shape, shape), for shape < 1."""
    # With x = u^(1/shape) the density's pole at 0 is gone; the half above 1/2 is the mirror of the one below.
    nodes, weights = np.polynomial.legendre.leggauss(64)
    highest = 0.5**shape

    def mass(u: Levels) -> Levels:
        points = u[:, None] * (nodes + 1) / 2
        return ((1 - points ** (1 / shape)) ** (shape - 1)) @ weights * u / 2

    half = float(mass(np.array([highest]))[0])
    wanted = np.minimum(shares, 1 - shares) * 2 * half
    below, above = np.zeros_like(wanted), np.full_like(wanted, highest)
    for _ in range(60):
        middle = (below + above) / 2
        short = mass(middle) < wanted
        below, above = np.where(short, middle, below), np.where(short, above, middle)
    quantiles = ((below + above) / 2) ** (1 / shape)
    return np.where(shares <= 0.5, quantiles, 1 - quantiles)


def sigma_to_timestep(sigmas: Levels, table: Levels) -> Levels:
    """The fractional training timesteps whose noise levels are ``sigmas``, linear in their logarithm."""
    # In diffusers' order and precision: its multistep solvers cut what comes out to whole timesteps.
    marks = np.log(table.astype(np.float32))
    wanted = np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(np.searchsorted(marks, wanted, side="right") - 1, 0, len(marks) - 2)
    share = np.clip((marks[below] - wanted) / (marks[below] - marks[below + 1]), 0, 1)
    timesteps: Levels = (1 - share) * below + share * (below + 1)
    return timesteps
