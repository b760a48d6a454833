"""Opening a network on a backend."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

from calotype.runtime.bundle.form import FLOAT32, INT8, Form, default_form
from calotype.runtime.bundle.manifest import ASIDE, Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, CalotypeError, quoted
from calotype.runtime.graphs.remarks import Inputs
from calotype.runtime.sessions.session import Changes, Session, Sizes

__all__ = [
    "BACKENDS",
    "Form",
    "Session",
    "Sizes",
    "check_backend",
    "choose_backend",
    "default_form",
    "has_int8",
    "int8_probe",
    "open_session",
]

logger = logging.getLogger(__name__)

# In the order in which "auto" tries them.
BACKENDS = ("tensorrt", "tensorrt-rtx", "cuda", "cpu")


def check_backend(name: str) -> None:
    """Raises BackendError when ``name`` is neither ``"auto"`` nor a backend."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise BackendError(f"there is no backend {quoted(name)}; valid: auto, {', '.join(BACKENDS)}")


def choose_backend(name: str, folder: Path, device: int | None = None) -> str:
    """``name``, or for ``"auto"`` the first backend that can run the bundle in ``folder`` here.

    Args:
        name: in ``BACKENDS``, or ``"auto"``.
        folder: the bundle's.
        device: the number of the GPU that is to run it; None is the first, or none.

    Raises:
        BackendError: for a name that is not known, or where a GPU was asked for and none can run it. A named backend is
            never replaced by another.
    """
    check_backend(name)
    if name == "cpu" and device is not None:
        raise BackendError(f"device={device} is the number of a GPU, and the backend cpu uses none; leave it out")
    if name != "auto":
        return name
    passed = []
    for backend in BACKENDS[:-1]:
        reason = obstacle(backend, folder, device)
        if reason is None:
            name = backend
            break
        passed.append(f"{backend} ({reason})")
    else:
        if device is not None:
            raise BackendError(f"device={device} can run none of the backends of a GPU: {', '.join(passed)}")
        name = BACKENDS[-1]
    logger.info("backend: %s%s", name, f"; passed over {', '.join(passed)}" if passed else "")
    return name


def obstacle(backend: str, folder: Path, device: int | None = None) -> str | None:
    """Why ``backend`` cannot run the bundle in ``folder`` here; None when it can. What costs least is asked first."""
    try:
        if backend == "cpu":
            return None if importlib.util.find_spec("onnxruntime") is not None else "onnxruntime is not installed"
        from calotype.runtime.sessions.cuda import load_cuda

        if backend == "cuda":
            if not _onnxruntime_has_cuda():
                return "onnxruntime-gpu is not installed"
            load_cuda("cuda", device or 0)
            return None
        return _obstacle_to_plans(backend, folder, device or 0)
    except CalotypeError as error:
        return str(error)


def _onnxruntime_has_cuda() -> bool:
    spec = importlib.util.find_spec("onnxruntime")
    places = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    return any((Path(place) / "capi" / "libonnxruntime_providers_cuda.so").exists() for place in places)


def _obstacle_to_plans(backend: str, folder: Path, device: int) -> str | None:
    from calotype.runtime.sessions.libraries import installed, load_library
    from calotype.runtime.sessions.plans import list_plans

    if not installed(backend):
        return f"{backend} is not installed"
    if not any(f".{backend}." in path.name for path in list_plans()):
        return "it has built no plan here"
    from calotype.runtime.sessions.cuda import load_cuda
    from calotype.runtime.sessions.tensorrt import serving_plans

    gpu, library = load_cuda(backend, device).gpu(), load_library(backend)
    library.check_gpu(gpu)
    for name, spec in Manifest.read(folder).networks.items():
        if name in ASIDE:
            continue
        serving_plans(folder, spec, backend, library.version, gpu.identity, gpu.driver)
    return None


def has_int8(folder: Path, spec: ModelSpec, backend: str) -> bool:
    """Whether ``backend`` can open the network in int8 here."""
    if backend != "cpu":
        return False
    from calotype.runtime.sessions.onnxruntime_cpu import serving_engine

    return serving_engine(folder, spec, INT8) is not None


def int8_probe(folder: Path, spec: ModelSpec) -> Inputs | None:
    """Inputs that the network met when its engine in int8 was calibrated; None where no engine here has any.

    Raises:
        BuildError, ValueError: the engine is damaged.
    """
    from calotype.runtime.sessions import onnxruntime_cpu

    return onnxruntime_cpu.int8_probe(folder, spec)


def open_session(
    folder: Path,
    spec: ModelSpec,
    backend: str,
    overrides: Changes | None = None,
    before_reading: Callable[[], None] = lambda: None,
    *,
    form: Form | None = None,
    trace: bool = False,
    threads: int | None = None,
    device: int | None = None,
) -> Session:
    """Open the network ``spec`` of the bundle in ``folder`` on ``backend``, a name that is not ``"auto"``.

    Args:
        folder: the bundle's.
        spec: the network.
        backend: where it runs.
        overrides: replace weights of those names, in the dtype in which the bundle stores them; names that the graph
            does not read are passed over.
        before_reading: called before the bundle's weights are read; an engine of the CPU backend has its own.
        form: what to compute in; None is what the backend is fast in, and with TensorRT whatever there are plans of.
        trace: note the time of each operator, on backends that can.
        threads: that the CPU backend computes with; None is
            :func:`calotype.runtime.sessions.processor.usable_threads`.
        device: the number of the GPU, on backends that use one; None is the first.

    Raises:
        BackendError: it is unknown, cannot run here or in this form, or cannot open the graph.
        BuildError: its plan is corrupt.
        MissingPackageError: its package is not installed.
    """
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {quoted(backend)}; valid: {', '.join(BACKENDS)}")
    if backend == "cpu":
        from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

        return OnnxRuntimeCpuSession(
            folder, spec, overrides, before_reading, form=form or FLOAT32, trace=trace, threads=threads
        )
    if form is not None and form.compute not in spec.graphs:
        raise BackendError(f"{backend} cannot compute in {form}; this bundle has graphs in {', '.join(spec.graphs)}")
    before_reading()
    if backend == "cuda":
        from calotype.runtime.sessions.onnxruntime_cuda import OnnxRuntimeCudaSession

        return OnnxRuntimeCudaSession(folder, spec, overrides, form=form or default_form(spec, backend), device=device)
    from calotype.runtime.sessions.tensorrt import TensorRtSession

    return TensorRtSession(folder, spec, backend, overrides, form=form, device=device)
