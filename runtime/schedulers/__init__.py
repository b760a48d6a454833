"""Schedulers in numpy, by the names that people type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.ddim import DDIM
from calotype.runtime.schedulers.ddpm import DDPM
from calotype.runtime.schedulers.deis import DEIS
from calotype.runtime.schedulers.dpm2 import DPM2, DPM2Ancestral
from calotype.runtime.schedulers.dpm_solver import DPMSolverMultistep
from calotype.runtime.schedulers.euler import Euler, EulerAncestral
from calotype.runtime.schedulers.heun import Heun
from calotype.runtime.schedulers.lcm import LCM
from calotype.runtime.schedulers.lms import LMS
from calotype.runtime.schedulers.pndm import PNDM
from calotype.runtime.schedulers.solver import Solver, State
from calotype.runtime.schedulers.spacing import Steps
from calotype.runtime.schedulers.tcd import TCD
from calotype.runtime.schedulers.unipc import UniPC

__all__ = ["SCHEDULERS", "SchedulerConfig", "Solver", "State", "create_solver", "scheduler_name"]

SCHEDULERS: Mapping[str, type[Solver]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "deis": DEIS,
    "dpm2": DPM2,
    "dpm2-a": DPM2Ancestral,
    "dpmpp-2m": DPMSolverMultistep,
    "dpmpp-2m-sde": DPMSolverMultistep,
    "euler": Euler,
    "euler-a": EulerAncestral,
    "heun": Heun,
    "lcm": LCM,
    "lms": LMS,
    "pndm": PNDM,
    "tcd": TCD,
    "unipc": UniPC,
}
_CLASS_NAMES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
# Two names for one class of diffusers; where it is called by its own name, the JSON decides.
_ALGORITHMS = {"dpmpp-2m": "dpmsolver++", "dpmpp-2m-sde": "sde-dpmsolver++"}
# Diffusers' classes for models whose latents are noised in another way, and settings that only such models have: their
# checkpoints would come out wrong, silently, with any solver here.
_OTHER_KINDS = ("FlowMatch", "EDM", "ConsistencyModel", "CMStochastic", "VQDiffusion", "CogVideoX", "Amused")
_FLOW_SETTINGS = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal", "invert_sigmas")


def scheduler_name(name: str) -> str:
    """The name in ``SCHEDULERS`` for any spelling, or for the name of diffusers' class.

    Raises:
        InputError: when there is none.
    """
    found = _CLASS_NAMES.get(name, name.lower().replace("_", "-"))
    if found not in SCHEDULERS:
        raise InputError(f"there is no scheduler {quoted(name)}; valid: {', '.join(sorted(SCHEDULERS))}")
    return found


def create_solver(
    name: str | None,
    config: Mapping[str, Any],
    num_inference_steps: int | None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Solver:
    """The scheduler ``name`` (None: the one that ``config`` names) with a checkpoint's ``scheduler_config.json``.

    Args:
        name: one in ``SCHEDULERS``, or of diffusers' class.
        config: diffusers' settings; ``sigma_spacing`` (see ``SPACINGS``) wins over its ``use_karras_sigmas`` and the
            like, and ``eta`` is the noise of ddim and tcd.
        num_inference_steps: 1 or more; None with a list of ``timesteps`` or ``sigmas``.
        timesteps: falling training timesteps to visit.
        sigmas: falling noise levels to visit, and last the one to reach, usually 0.

    Raises:
        InputError: for an unknown name, an unsupported setting, or steps that are out of range.
    """
    _check_kind(config)
    found = scheduler_name(str(config.get("_class_name", "ddim")) if name is None else name)
    solver = SCHEDULERS[found]
    for own in ("sigma_spacing", "eta"):
        if own in config and own not in solver.settings:
            raise InputError(f"{found} has no {own}; those that do: {_able(own)}")
    if name is not None and name not in _CLASS_NAMES and found in _ALGORITHMS:
        config = {**config, "algorithm_type": _ALGORITHMS[found]}
    settings = SchedulerConfig.from_json(config, solver.defaults, solver.settings)
    for kind, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is None:
            continue
        if kind not in solver.custom:
            raise InputError(f"{found} takes no list of {kind}; those that do: {_able(kind)}")
        if settings.sigma_spacing != "table":
            raise InputError(f"a list of {kind} and sigma_spacing={quoted(settings.sigma_spacing)} exclude each other")
    return solver(settings, Steps.of(num_inference_steps, timesteps, sigmas, settings.num_train_timesteps))


def _check_kind(config: Mapping[str, Any]) -> None:
    """Raises InputError where the checkpoint's settings are of another kind of noise than these solvers remove."""
    own = str(config.get("_class_name", ""))
    flow = [name for name in _FLOW_SETTINGS if config.get(name) not in (None, False)]
    flow += ["prediction_type"] if config.get("prediction_type") == "flow_prediction" else []
    if own.startswith(_OTHER_KINDS) or flow:
        what = own or f"one with {', '.join(flow)}"
        raise InputError(
            f"the model's scheduler is {what}, for another kind of noise than any of these takes away: "
            f"{', '.join(sorted(SCHEDULERS))}; no --scheduler can stand in for it"
        )


def _able(what: str) -> str:
    return ", ".join(sorted(name for name, solver in SCHEDULERS.items() if what in solver.custom | solver.settings))
