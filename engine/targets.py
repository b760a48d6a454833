"""The GPUs that a plan is built for, where they are not the one it is built on: ``calotype build --for``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from calotype.runtime.errors import InputError
from calotype.runtime.sessions.cuda import Gpu
from calotype.runtime.sessions.libraries import Library

AMPERE = 80  # the first generation of TensorRT's level of hardware compatibility that spans several


def parse_targets(text: str) -> tuple[str, ...]:
    """Read ``"sm86,sm89"``: compute capabilities, from the lowest to the highest.

    Raises:
        InputError: one is no compute capability, or is named twice.
    """
    found = [part.strip().lower() for part in text.split(",")]
    for part in found:
        if not re.fullmatch(r"sm[0-9]{2,3}", part):
            raise InputError(
                f"the target {part!r} is no compute capability; valid: those of GPUs, as in sm86,sm89,sm120"
            )
        if found.count(part) > 1:
            raise InputError(f"the target {part} is named twice; name each once")
    return tuple(sorted(found, key=_number))


def check_targets(library: Library, targets: Sequence[str], gpu: Gpu | None) -> None:
    """Raise InputError where ``library`` cannot build one plan for all of ``targets``.

    TensorRT-RTX compiles for any set of those that it knows, without a GPU. TensorRT tunes on the GPU that it builds
    on: a plan serves GPUs of that capability, or, from Ampere on, of every later generation.
    """
    if library.name == "tensorrt-rtx":
        known = known_targets(library)
        unknown = [target for target in targets if target not in known]
        if unknown:
            raise InputError(
                f"{library.name} {library.version} builds no plan for {', '.join(unknown)}; valid: {', '.join(known)}"
            )
        return
    here = "" if gpu is None else gpu.capability
    if here not in targets or (len(targets) > 1 and any(_number(target) < AMPERE for target in targets)):
        raise InputError(
            f"{library.name} builds a plan for several GPUs from sm{AMPERE} on, and on one of them: "
            f"{', '.join(targets)} cannot be built on {here}; name {here} alone, or build on a GPU of the list"
        )


def known_targets(library: Library) -> list[str]:
    """The compute capabilities that TensorRT-RTX compiles for."""
    names = [name.lower() for name in dir(library.api.ComputeCapability)]
    return sorted((name for name in names if re.fullmatch(r"sm[0-9]+", name)), key=_number)


def aim(library: Library, config: Any, targets: Sequence[str]) -> None:
    """Set the builder's ``config`` to targets that :func:`check_targets` has let pass."""
    api = library.api
    if library.name == "tensorrt-rtx":
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(api.ComputeCapability, target.upper()), index)
        return
    level = api.HardwareCompatibilityLevel
    config.hardware_compatibility_level = level.SAME_COMPUTE_CAPABILITY if len(targets) == 1 else level.AMPERE_PLUS


def _number(target: str) -> int:
    return int(target.removeprefix("sm"))
