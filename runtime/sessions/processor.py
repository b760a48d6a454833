"""The processor: its name, the instructions that ONNX Runtime lays weights out for, and how much of it is ours."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
from collections.abc import Collection
from pathlib import Path

from calotype.runtime.arguments import MOST_THREADS
from calotype.runtime.errors import InputError, quoted

# Those by which ONNX Runtime's kernels differ, on x86-64 and on ARM.
TELLING = {
    *("sse4_1", "avx", "avx2", "fma", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"),
}


def processor_name() -> str:
    """As people know it."""
    return _lines().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str | None:
    """The architecture and the instruction sets that tell, as text; None where the system does not say."""
    lines = _lines()
    flags = lines.get("flags") or lines.get("Features")
    return None if flags is None else " ".join([platform.machine(), *sorted(TELLING.intersection(flags.split()))])


def multiplies_bytes() -> bool:
    """Whether it adds up products of bytes exactly: older ones of x86-64 saturate at 16 bits."""
    return not {"avx512_vnni", "avx_vnni", "asimddp"}.isdisjoint((instruction_sets() or "").split())


def usable_threads() -> int:
    """How many threads a network may compute with.

    ``$CALOTYPE_THREADS``, else ``$OMP_NUM_THREADS``; else as many as there are cores among the processors that this
    process may run on, and no more than its control group allows.

    Raises:
        InputError: a variable is no whole number from 1 to ``MOST_THREADS``.
    """
    for variable in ("CALOTYPE_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").partition(",")[0].strip()  # OpenMP's has one for each level
        if text:
            return _whole(variable, text)
    cores, quota = _cores(_processors()), cgroup_processors()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def is_whole_machine(threads: int) -> bool:
    """Whether so many threads are one for each core there is."""
    return threads == _cores(range(os.cpu_count() or 1))


def cgroup_processors(
    processes: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """The time of how many processors this process's control group and those above it may take; None is any.

    Args:
        processes: which groups it belongs to.
        mounted: where the groups lie. In a container its own group is often all that is seen there.
    """
    try:
        lines = [line.split(":", 2) for line in processes.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for _, controllers, group in lines:
        if controllers == "":
            folders, read = [mounted, mounted / "unified"], _quota
        elif "cpu" in controllers.split(","):
            folders, read = [mounted / controllers, mounted / "cpu"], _quota_1
        else:
            continue
        for folder in folders:
            parts = [part for part in group.split("/") if part not in ("", "..")]
            found += [read(folder.joinpath(*parts[:count])) for count in range(len(parts) + 1)]
    return min((quota for quota in found if quota is not None), default=None)


def _processors() -> Collection[int]:
    """By number, those that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _quota(group: Path) -> float | None:
    """Of a group of version 2: ``max 100000``, or microseconds of how many."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _quota_1(group: Path) -> float | None:
    """Of a group of version 1, where -1 is no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((group / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None


def _cores(processors: Collection[int], topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many cores ``processors`` are on; two threads of one core would get in each other's way."""
    cores = set()
    for number in processors:
        try:
            cores.add((topology / f"cpu{number}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            return len(processors)
    return len(cores)


def _whole(variable: str, text: str) -> int:
    if not text.isdecimal() or not text.strip("0"):
        raise InputError(f"{variable}={text!r} is no number of threads; use 1 or more, or leave it out")
    if len(text) > 9 or int(text) > MOST_THREADS:
        raise InputError(f"{variable}={quoted(text)} is more threads than can run here; use 1 to {MOST_THREADS}")
    return int(text)


@functools.cache
def _lines() -> dict[str, str]:
    """Of the first core."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), value.strip())
    return found
