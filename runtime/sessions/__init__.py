"""Opening a network on a backend."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.manifest import CACHING, Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, CalotypeError
from calotype.runtime.sessions.session import Session, Sizes

__all__ = ["BACKENDS", "Session", "Sizes", "check_backend", "choose_backend", "has_int8", "open_session"]

logger = logging.getLogger(__name__)

# In the order in which "auto" tries them.
BACKENDS = ("tensorrt", "tensorrt-rtx", "cuda", "cpu")


def check_backend(name: str) -> None:
    """Raises BackendError when ``name`` is neither ``"auto"`` nor a backend."""
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; valid: auto, {', '.join(BACKENDS)}")


def choose_backend(name: str, folder: Path) -> str:
    """``name``, or for ``"auto"`` the first backend that can run the bundle in ``folder`` here.

    Raises:
        BackendError: for a name that is not known. A named backend is never replaced by another.
    """
    check_backend(name)
    if name != "auto":
        return name
    passed = []
    for backend in BACKENDS[:-1]:
        reason = obstacle(backend, folder)
        if reason is None:
            name = backend
            break
        passed.append(f"{backend} ({reason})")
    else:
        name = BACKENDS[-1]
    logger.info("backend: %s%s", name, f"; passed over {', '.join(passed)}" if passed else "")
    return name


def obstacle(backend: str, folder: Path) -> str | None:
    """Why ``backend`` cannot run the bundle in ``folder`` here; None when it can. What costs least is asked first."""
    try:
        if backend == "cpu":
            return None if importlib.util.find_spec("onnxruntime") is not None else "onnxruntime is not installed"
        from calotype.runtime.sessions.cuda import load_cuda

        if backend == "cuda":
            if not _onnxruntime_has_cuda():
                return "onnxruntime-gpu is not installed"
            load_cuda("cuda")
            return None
        return _obstacle_to_plans(backend, folder)
    except CalotypeError as error:
        return str(error)


def _onnxruntime_has_cuda() -> bool:
    spec = importlib.util.find_spec("onnxruntime")
    places = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    return any((Path(place) / "capi" / "libonnxruntime_providers_cuda.so").exists() for place in places)


def _obstacle_to_plans(backend: str, folder: Path) -> str | None:
    from calotype.runtime.sessions.libraries import installed, load_library
    from calotype.runtime.sessions.plans import list_plans

    if not installed(backend):
        return f"{backend} is not installed"
    if not any(f".{backend}." in path.name for path in list_plans()):
        return "it has built no plan here"
    from calotype.runtime.sessions.cuda import load_cuda
    from calotype.runtime.sessions.tensorrt import serving_plans

    gpu, library = load_cuda(backend).gpu(), load_library(backend)
    library.check_gpu(gpu)
    for name, spec in Manifest.read(folder).networks.items():
        if name in CACHING:
            continue
        serving_plans(folder, spec, backend, library.version, gpu.identity, gpu.driver)
    return None


def has_int8(folder: Path, spec: ModelSpec, backend: str) -> bool:
    """Whether ``backend`` can open the network in int8 here."""
    if backend != "cpu":
        return False
    from calotype.runtime.sessions.onnxruntime_cpu import serving_engine

    return serving_engine(folder, spec, "int8") is not None


def open_session(
    folder: Path,
    spec: ModelSpec,
    backend: str,
    overrides: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    before_reading: Callable[[], None] = lambda: None,
    *,
    precision: str = "float32",
    profile: bool = False,
) -> Session:
    """Open the network ``spec`` of the bundle in ``folder`` on ``backend``, a name that is not ``"auto"``.

    Args:
        folder: the bundle's.
        spec: the network.
        backend: where it runs.
        overrides: replace weights of those names, in the dtype in which the bundle stores them; names that the graph
            does not read are passed over.
        before_reading: called before the bundle's weights are read; an engine of the CPU backend has its own.
        precision: ``int8`` is an engine of the CPU backend; with ``float32`` backends choose what they are fast in.
        profile: note the time of each operator, on backends that can.

    Raises:
        BackendError: it is unknown, cannot run here, or cannot open the graph.
        BuildError: its plan is corrupt.
        MissingPackageError: its package is not installed.
    """
    if backend == "cpu":
        from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

        return OnnxRuntimeCpuSession(folder, spec, overrides, before_reading, precision=precision, profile=profile)
    if precision != "float32":
        raise BackendError(f"{backend} has no engines in {precision}; valid: cpu")
    before_reading()
    if backend == "cuda":
        from calotype.runtime.sessions.onnxruntime_cuda import OnnxRuntimeCudaSession

        return OnnxRuntimeCudaSession(folder, spec, overrides)
    if backend in BACKENDS:
        from calotype.runtime.sessions.tensorrt import TensorRtSession

        return TensorRtSession(folder, spec, backend, overrides)
    raise BackendError(f"there is no backend {backend!r}; valid: {', '.join(BACKENDS)}")
