"""What this machine has, and which backends can run on it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

# Backend -> (extra, distribution, import name). Only "cpu" is executed by this version.
PACKAGES = {
    "cpu": ("cpu", "onnxruntime", "onnxruntime"),
    "cuda": ("cuda", "onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx", "tensorrt_rtx"),
    "export": ("export", "torch", "torch"),
}
EXECUTED = ("cpu", "export")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One backend: whether it can run here, its version, and what to do where it cannot."""

    backend: str
    usable: bool
    version: str | None
    advice: str


def machine() -> dict[str, str]:
    """Processor, cores, memory, Python and NVIDIA driver, as text."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        driver = NVIDIA_DRIVER.read_text().splitlines()[0]
    except OSError:
        driver = "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory:.1f} GiB",
        "python": platform.python_version(),
        "nvidia driver": driver,
    }


def examine() -> list[Finding]:
    """Every backend, without importing any."""
    findings = []
    for backend, (extra, distribution, module) in PACKAGES.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = None
        found = version is not None and importlib.util.find_spec(module) is not None
        if backend not in EXECUTED:
            advice = "this version does not execute it yet"
        elif not found:
            advice = f"pip install 'calotype[{extra}]'"
        else:
            advice = ""
        findings.append(Finding(backend=backend, usable=found and not advice, version=version, advice=advice))
    return findings
