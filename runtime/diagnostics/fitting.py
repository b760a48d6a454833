"""Whether a plan can run on this machine, and why not; nothing is deserialized."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from calotype.runtime.diagnostics.doctor import PACKAGES
from calotype.runtime.errors import CalotypeError, install_line
from calotype.runtime.sessions.cuda import load_cuda
from calotype.runtime.sessions.plans import gpu_differences
from calotype.runtime.sessions.processor import instruction_sets


def misfits(key: Mapping[str, Any]) -> list[str]:
    """What keeps the plan of ``key`` from running here, each as one clause; empty when nothing does.

    The library and its version are asked for first, then the GPU and its driver, or the processor.
    """
    backend, found = str(key["backend"]), []
    version = _version(backend)
    if version is None:
        found.append(f"{backend} is not installed: {install_line(backend)}")
    elif key["version"] != version and not key.get("version_compatible", False):
        found.append(f"it was built by version {key['version']}, here is {version}")
    if backend == "cpu":
        here = instruction_sets()
        return found + ([] if key["processor"] == here else [f"it is for {key['processor']}, here is {here}"])
    try:
        gpu = load_cuda(backend).gpu()
    except CalotypeError as error:
        return [*found, f"no GPU can be used here: {error}"]
    return found + gpu_differences(key, gpu.identity, gpu.driver)


def _version(backend: str) -> str | None:
    """Of the package that runs the backend's plans, whichever of them is there."""
    for distribution in PACKAGES.get(backend, ()):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
