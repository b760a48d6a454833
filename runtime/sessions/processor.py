"""The processor: its name, and the instructions that ONNX Runtime lays weights out for."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

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
