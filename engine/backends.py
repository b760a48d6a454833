"""TensorRT and TensorRT-RTX: one API under two module names, imported when a plan is built."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from calotype.runtime.errors import BackendError, MissingPackageError

# Backend -> (module, extra).
MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx")}
PORTABLE = {"gpu": "portable", "driver": "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """An imported builder library."""

    name: str
    api: Any
    version: str


def load_backend(name: str) -> Backend:
    """Import the library of ``name``.

    Raises:
        BackendError: there is no backend of that name.
        MissingPackageError: its package is not installed.
    """
    if name not in MODULES:
        raise BackendError(f"there is no builder {name!r}; valid: {', '.join(MODULES)}")
    module, extra = MODULES[name]
    try:
        api = importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(module, extra) from error
    return Backend(name=name, api=api, version=str(api.__version__))


def target() -> dict[str, str]:
    """The GPU a plan is built on and its driver; ``portable`` and ``none`` where there is none.

    The driver is asked for first: TensorRT's own calls may crash the process without one.
    """
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return dict(PORTABLE)
    try:
        status, count = cuda.cudaGetDeviceCount()
    except RuntimeError:  # the bindings' own word for a libcuda that is not there
        return dict(PORTABLE)
    if status != cuda.cudaError_t.cudaSuccess or count == 0:
        return dict(PORTABLE)
    _, device = cuda.cudaGetDevice()
    _, properties = cuda.cudaGetDeviceProperties(device)
    _, driver = cuda.cudaDriverGetVersion()
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return {"gpu": f"{name} sm{properties.major}{properties.minor}", "driver": str(driver)}
