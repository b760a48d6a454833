"""What this machine has, and which backends can run on it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform

from calotype.runtime.diagnostics.platforms import here, refusal
from calotype.runtime.errors import CalotypeError, install_line
from calotype.runtime.sessions.cuda import load_cuda
from calotype.runtime.sessions.processor import processor_name

# Backend -> distribution -> import name; the first that is there counts. An extra has its backend's name.
PACKAGES = {
    "cpu": {"onnxruntime": "onnxruntime", "onnxruntime-gpu": "onnxruntime"},
    "cuda": {"onnxruntime-gpu": "onnxruntime"},
    "tensorrt": {"tensorrt-cu13": "tensorrt", "tensorrt-lean-cu13": "tensorrt_lean"},
    "tensorrt-rtx": {"tensorrt-rtx": "tensorrt_rtx"},
    "export": {"torch": "torch"},
}
NEED_GPU = ("cuda", "tensorrt", "tensorrt-rtx")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One backend: whether it can run here, its version, and what to do where it cannot."""

    backend: str
    usable: bool
    version: str | None
    advice: str


def machine() -> dict[str, str]:
    """Processor, cores, memory, Python and GPU, as text."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        found = load_cuda("cuda").gpu()
        gpu = f"{found.identity}, {found.memory / 2**30:.0f} GiB, CUDA {found.driver}"
    except CalotypeError as error:
        gpu = f"none: {error}"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory:.1f} GiB",
        "python": platform.python_version(),
        "gpu": gpu,
    }


def examine() -> list[Finding]:
    """Every backend. None is imported, but where its package is there, the GPU is asked for."""
    findings = []
    for backend, packages in PACKAGES.items():
        version = next(filter(None, (_version(*package) for package in packages.items())), None)
        if version is None:
            advice = refusal(backend, here()) or install_line(backend)
        elif backend in NEED_GPU:
            advice = _gpu_trouble(backend)
        else:
            advice = ""
        findings.append(Finding(backend=backend, usable=not advice, version=version, advice=advice))
    return findings


def _version(distribution: str, module: str) -> str | None:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if importlib.util.find_spec(module) is not None else None


def _gpu_trouble(extra: str) -> str:
    try:
        load_cuda(extra)
    except CalotypeError as error:
        return str(error)
    return ""
