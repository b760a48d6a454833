"""Samplers and schedulers as AUTOMATIC1111's web interface calls them, and what they are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.runtime.errors import quoted
from calotype.runtime.schedulers import SCHEDULERS
from calotype.serving.errors import RequestRefusedError

# By its names: ours, and what its schedule "Automatic" is there; "" is the checkpoint's own.
SAMPLERS: Mapping[str, tuple[str, str]] = {
    "DPM++ 2M": ("dpmpp-2m", "karras"),
    "DPM++ 2M SDE": ("dpmpp-2m-sde", "exponential"),
    "Euler a": ("euler-a", ""),
    "Euler": ("euler", ""),
    "LMS": ("lms", ""),
    "Heun": ("heun", ""),
    "DPM2": ("dpm2", "karras"),
    "DPM2 a": ("dpm2-a", "karras"),
    "DDIM": ("ddim", ""),
    "DDPM": ("ddpm", ""),
    "PLMS": ("pndm", ""),
    "UniPC": ("unipc", ""),
    "LCM": ("lcm", ""),
    "DEIS": ("deis", ""),
    "TCD": ("tcd", ""),
}
# Name and label there, and our settings.
SCHEDULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "automatic": ("Automatic", {}),
    "uniform": ("Uniform", {"sigma_spacing": "table", "timestep_spacing": "linspace"}),
    "karras": ("Karras", {"sigma_spacing": "karras"}),
    "exponential": ("Exponential", {"sigma_spacing": "exponential"}),
    "sgm_uniform": ("SGM Uniform", {"sigma_spacing": "table", "timestep_spacing": "trailing"}),
    "beta": ("Beta", {"sigma_spacing": "beta"}),
    "align_your_steps": ("Align Your Steps", {}),
}
# Its older versions say the schedule in the sampler's name: "DPM++ 2M Karras".
SUFFIXES = ("karras", "exponential")
AYS = {"sdxl": "ays-sdxl"}  # by family; the others are Stable Diffusion 1's
NOISY = ("euler-a", "dpm2-a")  # eta is 1 where nobody says


def sampling(sampler: str, schedule: str | None, family: str) -> tuple[str, dict[str, Any]]:
    """Our scheduler's name and its settings.

    Args:
        sampler: one of ``SAMPLERS`` in any case, with or without a schedule behind it, or a name of ours.
        schedule: a name or a label of ``SCHEDULES``; None is the sampler's own.
        family: the model's.

    Raises:
        RequestRefusedError: there is no such sampler, or no such schedule.
    """
    plain, own = _split(sampler)
    named = {name.lower(): found for name, found in SAMPLERS.items()}
    named |= {name: (name, "") for name in SCHEDULERS}
    if plain not in named:
        valid = ", ".join(SAMPLERS)
        raise RequestRefusedError(f"there is no sampler {quoted(sampler)}; valid: {valid}", param="sampler_name")
    name, automatic = named[plain]
    chosen = _schedule(schedule or "automatic")
    if chosen == "automatic":
        chosen = own or automatic or chosen
    if chosen == "align_your_steps":
        return name, {"sigma_spacing": AYS.get(family, "ays-sd1")}
    return name, dict(SCHEDULES[chosen][1])


def label(scheduler: str) -> str:
    """The name there of a scheduler of ours."""
    return next(name for name, (own, _) in SAMPLERS.items() if own == scheduler)


def _split(sampler: str) -> tuple[str, str]:
    """``DPM++ 2M Karras`` is ``dpm++ 2m`` and ``karras``."""
    name = sampler.strip().lower()
    for suffix in SUFFIXES:
        if name.endswith(f" {suffix}"):
            return name.removesuffix(suffix).strip(), suffix
    return name, ""


def _schedule(name: str) -> str:
    lowered = name.strip().lower()
    for own, (shown, _) in SCHEDULES.items():
        if lowered in (own, shown.lower()):
            return own
    valid = ", ".join(shown for shown, _ in SCHEDULES.values())
    raise RequestRefusedError(f"there is no schedule {quoted(name)}; valid: {valid}", param="scheduler")
