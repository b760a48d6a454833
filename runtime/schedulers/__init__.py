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
from calotype.runtime.schedulers.flow import FlowEuler, FlowHeun
from calotype.runtime.schedulers.heun import Heun
from calotype.runtime.schedulers.lcm import LCM
from calotype.runtime.schedulers.lms import LMS
from calotype.runtime.schedulers.pndm import PNDM
from calotype.runtime.schedulers.solver import Solver, State
from calotype.runtime.schedulers.spacing import Steps
from calotype.runtime.schedulers.tcd import TCD
from calotype.runtime.schedulers.unipc import UniPC

__all__ = [
    "FLOW_SCHEDULERS",
    "SCHEDULERS",
    "SchedulerConfig",
    "Solver",
    "State",
    "create_solver",
    "model_scheduler",
    "scheduler_name",
]

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
# The same names for models that are trained by flow matching, whose latents are noised in another way.
FLOW_SCHEDULERS: Mapping[str, type[Solver]] = {"euler": FlowEuler, "heun": FlowHeun}
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
_FLOW_CLASS_NAMES = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}
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


def model_scheduler(config: Mapping[str, Any]) -> str:
    """The name of the scheduler that a checkpoint's ``scheduler_config.json`` names; raises as that."""
    name = str(config.get("_class_name", "ddim"))
    return _FLOW_CLASS_NAMES.get(name) or scheduler_name(name)


def create_solver(
    name: str | None,
    config: Mapping[str, Any],
    num_inference_steps: int | None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    flow: bool = False,
) -> Solver:
    """The scheduler ``name`` (None: the one that ``config`` names) with a checkpoint's ``scheduler_config.json``.

    Args:
        name: one in ``SCHEDULERS``, or of diffusers' class.
        config: diffusers' settings; ``sigma_spacing`` (see ``SPACINGS``) wins over its ``use_karras_sigmas`` and the
            like, and ``eta`` is the noise of ddim and tcd.
        num_inference_steps: 1 or more; None with a list of ``timesteps`` or ``sigmas``.
        timesteps: falling training timesteps to visit.
        sigmas: falling noise levels to visit, and last the one to reach, usually 0. Those of flow matching are shifted,
            as diffusers does.
        flow: whether the model was trained by flow matching, whose solvers are those in ``FLOW_SCHEDULERS``.

    Raises:
        InputError: for an unknown name, an unsupported setting, or steps that are out of range.
    """
    _check_kind(config, flow)
    found = model_scheduler(config) if name is None else scheduler_name(name)
    solvers = FLOW_SCHEDULERS if flow else SCHEDULERS
    if found not in solvers:
        raise InputError(
            f"{found} is no scheduler for a model that is trained by flow matching; valid: {', '.join(sorted(solvers))}"
        )
    solver = solvers[found]
    for own in ("sigma_spacing", "eta"):
        if own in config and own not in solver.settings:
            raise InputError(f"{found} has no {own}; those that do: {_able(own, solvers) or 'none'}")
    if name is not None and name not in _CLASS_NAMES and found in _ALGORITHMS:
        config = {**config, "algorithm_type": _ALGORITHMS[found]}
    settings = SchedulerConfig.from_json(config, solver.defaults, solver.settings)
    for kind, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is None:
            continue
        if kind not in solver.custom:
            raise InputError(f"{found} takes no list of {kind}; those that do: {_able(kind, solvers) or 'none'}")
        if settings.sigma_spacing != "table":
            raise InputError(f"a list of {kind} and sigma_spacing={quoted(settings.sigma_spacing)} exclude each other")
    return solver(settings, Steps.of(num_inference_steps, timesteps, sigmas, settings.num_train_timesteps))


def _check_kind(config: Mapping[str, Any], flow: bool) -> None:
    """Raises InputError where the checkpoint's settings are of another kind of noise than these solvers remove."""
    own = str(config.get("_class_name", ""))
    if flow:
        if own not in _FLOW_CLASS_NAMES:
            valid = ", ".join(_FLOW_CLASS_NAMES)
            raise InputError(f"the model's scheduler is {own or 'not named'}, and it needs one of {valid}")
        return
    names = [name for name in _FLOW_SETTINGS if config.get(name) not in (None, False)]
    names += ["prediction_type"] if config.get("prediction_type") == "flow_prediction" else []
    if own.startswith(_OTHER_KINDS) or names:
        what = own or f"one with {', '.join(names)}"
        raise InputError(
            f"the model's scheduler is {what}, for another kind of noise than any of these takes away: "
            f"{', '.join(sorted(SCHEDULERS))}; no --scheduler can stand in for it"
        )


def _able(what: str, solvers: Mapping[str, type[Solver]]) -> str:
    return ", ".join(sorted(name for name, solver in solvers.items() if what in solver.custom | solver.settings))
