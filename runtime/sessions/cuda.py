"""The CUDA runtime's calls that the sessions make; each failure becomes an error that says what to do."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from calotype.runtime.errors import BackendError, MissingPackageError

Pointer = int
ADVICE = {
    "cudaErrorIllegalAddress": "the GPU's context is lost: start the process again, and report this with the plan",
    "cudaErrorNoKernelImageForDevice": "the plan is for another GPU; build one here, see calotype build --help",
    "cudaErrorDevicesUnavailable": "another process holds the GPU for itself",
    "cudaErrorECCUncorrectable": "the GPU's memory is failing",
}
DEFAULT_ADVICE = "see calotype doctor; --backend cpu needs no GPU"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that a process uses; memory in bytes."""

    name: str
    capability: str
    driver: str
    memory: int

    @property
    def identity(self) -> str:
        """As it stands in a plan's key."""
        return f"{self.name} {self.capability}"


# The GPUs that this process has used, by number. CUDA has a current one for each thread, at first 0.
_used: set[int] = set()


class Cuda:
    """A loaded CUDA runtime with a GPU, the one of that number among those that CUDA_VISIBLE_DEVICES leaves."""

    def __init__(self, api: Any, number: int = 0) -> None:
        self._api, self.number = api, number
        _used.add(number)
        self._success = api.cudaError_t.cudaSuccess

    def use(self) -> None:
        """Make its GPU the thread's current one, for a library that asks for none. The calls here do so themselves."""
        if _used != {0}:
            self._succeed("cudaSetDevice", self.number)

    def gpu(self) -> Gpu:
        """What it is."""
        properties = self._call("cudaGetDeviceProperties", self.number)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return Gpu(
            name=name.rstrip("\0"),
            capability=f"sm{properties.major}{properties.minor}",
            driver=str(self._call("cudaDriverGetVersion")),
            memory=int(properties.totalGlobalMem),
        )

    def free_memory(self) -> int:
        """Bytes of GPU memory that are free now."""
        return int(self._call("cudaMemGetInfo")[0])

    def malloc(self, size: int) -> Pointer:
        """GPU memory, aligned to 256 bytes at least."""
        return int(self._call("cudaMalloc", size, asked=size))

    def free(self, pointer: Pointer) -> None:
        """Give GPU memory back."""
        self._call("cudaFree", pointer)

    def host_alloc(self, size: int) -> Pointer:
        """Pinned host memory, which copies need to run beside the GPU's work and inside a graph."""
        return int(self._call("cudaMallocHost", size, asked=size))

    def host_free(self, pointer: Pointer) -> None:
        """Give pinned memory back."""
        self._call("cudaFreeHost", pointer)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Its inverse."""
        self._call("cudaStreamDestroy", stream)

    def copy_to_device(self, target: Pointer, source: Pointer, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes of pinned memory."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def copy_to_host(self, target: Pointer, source: Pointer, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes into pinned memory."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def copy_on_device(self, target: Pointer, source: Pointer, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes of the GPU's memory."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until what is queued is done; errors of queued work arrive here."""
        self._call("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues from now on, instead of doing it."""
        self._call("cudaStreamBeginCapture", stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> Any:
        """The graph of what was recorded, ready to launch."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self, stream: int) -> None:
        """Leave a recording that failed; what it says of that is no news."""
        status, graph = self._api.cudaStreamEndCapture(stream)
        if status == self._success and graph is not None:
            self._call("cudaGraphDestroy", graph)
        self._api.cudaGetLastError()

    def launch(self, graph: Any, stream: int) -> None:
        """Queue a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Give a graph back."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any, asked: int = 0) -> Any:
        self.use()
        return self._succeed(function, *arguments, asked=asked)

    def _succeed(self, function: str, *arguments: Any, asked: int = 0) -> Any:
        status, *values = getattr(self._api, function)(*arguments)
        if status != self._success:
            raise BackendError(self._explain(function, status, asked))
        return values[0] if len(values) == 1 else values

    def _explain(self, function: str, status: Any, asked: int) -> str:
        self._api.cudaGetLastError()  # else the next call that asks reports this one's failure
        if status == self._api.cudaError_t.cudaErrorMemoryAllocation:
            _, free, total = self._api.cudaMemGetInfo()
            return (
                f"out of memory: {asked / 2**20:.0f} MiB were asked for by {function}, "
                f"{free / 2**20:.0f} of the GPU's {total / 2**20:.0f} MiB are free; "
                "use a smaller size or batch, --low-memory, or a plan with a smaller profile (calotype build)"
            )
        return f"{function} failed: {status.name}; {ADVICE.get(status.name, DEFAULT_ADVICE)}"


def load_cuda(extra: str, number: int = 0) -> Cuda:
    """The CUDA runtime, when there is a GPU that it can use. TensorRT must not be touched before: without a driver
    its runtime crashes the process.

    Args:
        extra: what installs the bindings.
        number: of the GPU, among those that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        MissingPackageError: cuda-bindings is not installed; ``extra`` brings it.
        BackendError: there is no driver, it is too old, or there is no GPU, or none of that number.
    """
    try:
        api = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingPackageError("cuda-bindings", extra) from error
    try:
        status, count = api.cudaGetDeviceCount()
        _, driver = api.cudaDriverGetVersion()
    except RuntimeError as error:  # the bindings' own word for a libcuda that is not there
        raise BackendError(f"there is no NVIDIA driver ({error}); install one, or use --backend cpu") from error
    if status == api.cudaError_t.cudaErrorInsufficientDriver:
        if driver == 0:
            raise BackendError("there is no NVIDIA driver; install one, or use --backend cpu")
        _, needed = api.cudaRuntimeGetVersion()
        raise BackendError(
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, {_version(needed)} is needed; "
            "update the driver, or use --backend cpu"
        )
    if status == api.cudaError_t.cudaErrorInitializationError:
        raise BackendError(
            "CUDA was in use before this process was forked, and cannot be in it; open the first model after the fork, "
            'or start processes with multiprocessing.get_context("spawn")'
        )
    if status != api.cudaError_t.cudaSuccess or count == 0:
        raise BackendError(
            f"there is no usable NVIDIA GPU ({status.name}); see nvidia-smi and CUDA_VISIBLE_DEVICES, "
            "or use --backend cpu"
        )
    if number >= count:
        raise BackendError(
            f"there is no GPU {number}; valid: {', '.join(map(str, range(count)))}; see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES"
        )
    return Cuda(api, number)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
