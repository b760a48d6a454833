"""Opening a network on a backend."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import BackendError
from calotype.runtime.sessions.session import Session, Sizes
from calotype.runtime.spec import ModelSpec

__all__ = ["BACKENDS", "Session", "Sizes", "choose_backend", "open_session"]

logger = logging.getLogger(__name__)

# In the order in which "auto" tries them.
BACKENDS = ("cpu",)


def choose_backend(name: str) -> str:
    """``name``, or for ``"auto"`` the first backend that can run here.

    Raises:
        BackendError: for a name that is not known. A named backend is never replaced by another.
    """
    if name == "auto":
        logger.info("backend: cpu (ONNX Runtime), the only one this version executes")
        return "cpu"
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; valid: auto, {', '.join(BACKENDS)}")
    return name


def open_session(
    folder: Path, spec: ModelSpec, backend: str, overrides: Mapping[str, NDArray[np.floating[Any]]] | None = None
) -> Session:
    """Open the network ``spec`` of the bundle in ``folder`` on ``backend``, a name that is not ``"auto"``.

    ``overrides`` replace weights of those names, in the dtype in which the bundle stores them; names that the graph
    does not read are passed over.

    Raises:
        BackendError: it is unknown, or cannot open the graph.
        MissingPackageError: its package is not installed.
    """
    if backend == "cpu":
        from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

        return OnnxRuntimeCpuSession(folder, spec, overrides)
    raise BackendError(f"there is no backend {backend!r}; valid: {', '.join(BACKENDS)}")
