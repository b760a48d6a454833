"""What a kind of machine cannot install, whoever asks: said by ``calotype doctor`` instead of a line that would fail.

The table of wheels that this rests on is in docs/edge.md, with its day; ``make wheels`` makes it anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from pathlib import Path

# The glibc that wheels for aarch64 need; TensorRT-RTX has some for 2.35 and none for 2.31.
GLIBC_ON_ARM = {"cuda": (2, 34), "tensorrt-rtx": (2, 35)}
JETSON = Path("/etc/nv_tegra_release")  # of every JetPack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """A machine as far as wheels go.

    Attributes:
        machine: its architecture, as ``aarch64``.
        glibc: the version of its C library; None where that is another one.
        jetson: whether NVIDIA's JetPack is on it.
    """

    machine: str
    glibc: tuple[int, int] | None
    jetson: bool = False


def here() -> Platform:
    """The machine that runs this."""
    name, version = platform.libc_ver()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # asked of the library, where it is glibc
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    major, _, minor = version.partition(".")
    known = name == "glibc" and major.isdecimal() and minor.isdecimal()
    return Platform(
        machine=platform.machine(), glibc=(int(major), int(minor)) if known else None, jetson=JETSON.exists()
    )


def refusal(backend: str, machine: Platform) -> str | None:
    """Why the extra of ``backend`` cannot be installed on ``machine`` from the package index; None where it can."""
    if machine.machine not in ("x86_64", "aarch64"):
        return f"not supported on {machine.machine}: there are packages for x86_64 and aarch64"
    if machine.glibc is None:
        return "not supported here: the packages need glibc, which this system has not got"
    if machine.machine != "aarch64":
        return None
    if backend == "tensorrt":
        return (
            "on aarch64 the package index has TensorRT's bindings and not its libraries, which JetPack brings: "
            "make the environment with python3 -m venv --system-site-packages, or carry version-compatible plans to "
            "tensorrt-lean; see docs/edge.md"
        )
    if machine.glibc < GLIBC_ON_ARM.get(backend, (0, 0)):
        needed, found = (".".join(map(str, version)) for version in (GLIBC_ON_ARM[backend], machine.glibc))
        return f"not supported here: on aarch64 it needs glibc {needed}, here is {found}; use the CPU"
    return None
