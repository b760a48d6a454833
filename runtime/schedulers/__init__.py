"""Schedulers in numpy, by the names that people type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.ddim import DDIM
from calotype.runtime.schedulers.ddpm import DDPM
from calotype.runtime.schedulers.dpm_solver import DPMSolverMultistep
from calotype.runtime.schedulers.euler import Euler
from calotype.runtime.schedulers.solver import Solver, State

__all__ = ["SCHEDULERS", "SchedulerConfig", "Solver", "State", "create_solver", "scheduler_name"]

SCHEDULERS: Mapping[str, type[Solver]] = {"ddim": DDIM, "ddpm": DDPM, "dpmpp-2m": DPMSolverMultistep, "euler": Euler}
_CLASS_NAMES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "EulerDiscreteScheduler": "euler",
}


def scheduler_name(name: str) -> str:
    """The name in ``SCHEDULERS`` for any spelling, or for the name of diffusers' class.

    Raises:
        InputError: when there is none.
    """
    found = _CLASS_NAMES.get(name, name.lower().replace("_", "-"))
    if found not in SCHEDULERS:
        raise InputError(f"there is no scheduler {name!r}; valid: {', '.join(sorted(SCHEDULERS))}")
    return found


def create_solver(name: str | None, config: Mapping[str, Any], num_inference_steps: int) -> Solver:
    """The scheduler ``name`` (None: the one that ``config`` names) with a checkpoint's ``scheduler_config.json``.

    Raises:
        InputError: for an unknown name, an unsupported setting, or a number of steps out of range.
    """
    found = scheduler_name(str(config.get("_class_name", "ddim")) if name is None else name)
    solver = SCHEDULERS[found]
    return solver(SchedulerConfig.from_json(config, solver.defaults), num_inference_steps)
