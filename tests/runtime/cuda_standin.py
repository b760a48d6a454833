# ruff: noqa: N802, N815 - the names are NVIDIA's
"""Stand-ins for the CUDA runtime and for TensorRT-RTX's runtime half, which check order and addresses.

Memory is real, so data flows through copies, graphs and the "network"; what is used before it is allocated or after it
is freed raises. They prove ordering, not numbers: nothing here says what a GPU computes, or how fast.
"""

from __future__ import annotations

import ctypes
import enum
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Status(enum.Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInitializationError = 3
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


class Kind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Mode(enum.Enum):
    cudaStreamCaptureModeThreadLocal = 1


class Properties:
    name, major, minor, totalGlobalMem = b"Stand-in\0\0", 8, 9, 1 << 30


class Cuda:
    """What stands for ``cuda.bindings.runtime``.

    ``calls`` counts by name, ``copied`` the copies that were made, by direction and bytes; ``limit`` is the memory of
    all its ``count`` GPUs in bytes. A GPU's stream, memory and plans may be used by threads alone whose current one it
    is; its stream's number is 7 and its own.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamNonBlocking = Status, Kind, Mode, 1

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.copied: Counter[tuple[Kind, int]] = Counter()
        self.limit, self.count = 1 << 30, 1
        self.owners: dict[int, int] = {}
        self._thread = threading.local()
        self.status, self.driver, self.runtime = Status.cudaSuccess, 13000, 13000
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.fail_launch = False

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and not name.startswith(("cudaError", "cudaMemcpyK", "cudaStreamCaptureM")):
            object.__getattribute__(self, "calls")[name] += 1
        return object.__getattribute__(self, name)

    def cudaGetDeviceCount(self) -> tuple[Status, int]:
        return self.status, self.count

    def cudaSetDevice(self, number: int) -> tuple[Status]:
        assert number < self.count
        self._thread.current = number
        return (Status.cudaSuccess,)

    @property
    def current(self) -> int:
        """The calling thread's GPU."""
        return getattr(self._thread, "current", 0)

    def check_stream(self, stream: int) -> None:
        assert stream in self.streams
        assert stream == 7 + self.current, "a stream is used where another GPU is the current one"

    def cudaDriverGetVersion(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self.runtime

    def cudaGetDeviceProperties(self, number: int) -> tuple[Status, Properties]:
        assert number < self.count
        return Status.cudaSuccess, Properties()

    def cudaGetLastError(self) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return Status.cudaSuccess, self.limit - self.used(), self.limit

    def used(self) -> int:
        return sum(map(ctypes.sizeof, self.device.values()))

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:
        if size > self.limit - self.used():
            return Status.cudaErrorMemoryAllocation, None
        pointer = self._allocate(self.device, size)
        self.owners[pointer] = self.current
        return Status.cudaSuccess, pointer

    def cudaMallocHost(self, size: int) -> tuple[Status, int]:
        return Status.cudaSuccess, self._allocate(self.host, size)

    def _allocate(self, where: dict[int, Any], size: int) -> int:
        memory = (ctypes.c_byte * (size + 256))()
        pointer = -(-ctypes.addressof(memory) // 256) * 256
        where[pointer] = memory
        return pointer

    def cudaFree(self, pointer: int) -> tuple[Status]:
        del self.device[pointer]
        return (Status.cudaSuccess,)

    def cudaFreeHost(self, pointer: int) -> tuple[Status]:
        del self.host[pointer]
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, _: int) -> tuple[Status, int]:
        self.streams.add(7 + self.current)
        return Status.cudaSuccess, 7 + self.current

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams.remove(stream)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        self.check_stream(stream)
        assert self.recording is None, "a wait while a graph is recorded"
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: int) -> tuple[Status]:
        self.check_stream(stream)

        def copy() -> None:
            self.check(self.host if kind is Kind.cudaMemcpyDeviceToHost else self.device, target, size)
            self.check(self.host if kind is Kind.cudaMemcpyHostToDevice else self.device, source, size)
            ctypes.memmove(target, source, size)
            self.copied[kind, size] += 1

        self.queue(copy)
        return (Status.cudaSuccess,)

    def queue(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def check(self, where: dict[int, Any], pointer: int, size: int) -> None:
        assert pointer in where, "memory is used before it is allocated, or after it is freed"
        assert where is self.host or self.owners[pointer] == self.current, "memory of another GPU is used"
        assert size <= ctypes.sizeof(where[pointer]) - 256, "more is used than was allocated"

    def cudaStreamBeginCapture(self, stream: int, _: Mode) -> tuple[Status]:
        self.check_stream(stream)
        self.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, _: int) -> tuple[Status, Any]:
        recorded, self.recording = self.recording, None
        return Status.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], _: int) -> tuple[Status, int]:
        number = 1 + max(self.graphs, default=0)
        self.graphs[number] = graph
        return Status.cudaSuccess, number

    def cudaGraphDestroy(self, _: Any) -> tuple[Status]:
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Status]:
        self.check_stream(stream)
        if self.fail_launch:
            return (Status.cudaErrorIllegalAddress,)
        for work in self.graphs[graph]:
            work()
        return (Status.cudaSuccess,)


Network = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


class Library:
    """What stands for ``tensorrt_rtx`` at run time: any plan is ``network``, its arena of ``activations`` bytes.

    Where it is ``weighted``, the weights that were put into a plan are added to what it computes.
    """

    class ILogger:
        class Severity(enum.Enum):
            ERROR = 1
            INTERNAL_ERROR = 2

        def log(self, severity: Any, message: str) -> None: ...

    class TensorLocation(enum.Enum):
        HOST = 0
        DEVICE = 1

    class ExecutionContextAllocationStrategy(enum.Enum):
        USER_MANAGED = 2

    class CudaGraphStrategy(enum.Enum):
        DISABLED = 0

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        EAGER = 1

    class ComputeCapability(enum.Enum):
        SM89 = 89

    __version__ = "1.7"
    __spec__ = "a module has one"

    def __init__(self, cuda: Cuda, network: Network, dtypes: dict[str, str], activations: int = 4096) -> None:
        self.cuda, self.network, self.dtypes, self.activations = cuda, network, dtypes, activations
        self.contexts = 0
        self.open = self.deserialized = 0
        self.refuses: str | None = None
        self.refitted: dict[str, Any] = {}
        self.refittable = ["conv_in.weight", "conv_out.weight"]
        self.base = dict[str, NDArray[Any]]()  # what a refit from a file puts in
        self.partners = dict[str, str]()  # weights that are put in together
        self.weighted = False
        self.refused = ""  # a weight that is not taken
        self.capturable = True
        self.kernels: list[bytes] = []

    def Runtime(self, logger: Any) -> Runtime:
        assert self.cuda.streams, "TensorRT is touched before there is a device"
        return Runtime(self, logger)

    def Refitter(self, engine: Engine, logger: Any) -> Refitter:
        return Refitter(self, engine)

    def OnnxParserRefitter(self, refitter: Refitter, logger: Any) -> Refitter:
        return refitter

    def Weights(self, array: Any) -> Any:
        return array


class Refitter:
    def __init__(self, library: Library, engine: Engine) -> None:
        self.library, self.engine, self.held = library, engine, dict[str, Any]()

    def refit_from_file(self, path: str) -> bool:
        self.held |= {"from": path, **self.library.base}
        return True

    def get_all_weights(self) -> list[str]:
        return self.library.refittable

    def set_named_weights(self, name: str, weights: Any) -> bool:
        if name == self.library.refused:
            return False
        self.held[name] = weights
        return True

    def refit_cuda_engine_async(self, stream: int) -> bool:
        self.library.cuda.check_stream(stream)
        if self.get_missing_weights():
            return False
        self.library.refitted = dict(self.held)
        # What was put in stays until it is replaced.
        self.engine.weights.update({name: np.array(value) for name, value in self.held.items() if name != "from"})
        self.engine.refits += 1
        return True

    def get_missing_weights(self) -> list[str]:
        wanted = [self.library.partners[name] for name in self.held if name in self.library.partners]
        return [name for name in wanted if name not in self.held and "from" not in self.held]


class Runtime:
    def __init__(self, library: Library, logger: Any) -> None:
        self.library, self.logger = library, logger

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if self.library.refuses is not None:
            self.logger.log(Library.ILogger.Severity.ERROR, self.library.refuses)
            return None
        return Engine(self.library)


class Configuration:
    """Also the runtime cache that it holds."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...

    def create_runtime_cache(self) -> Configuration:
        return self

    def set_runtime_cache(self, cache: Any) -> None: ...

    def get_runtime_cache(self) -> Configuration:
        return self

    def serialize(self) -> bytes:
        return b"kernels"

    def deserialize(self, data: bytes) -> bool:
        self.library.kernels.append(data)
        return True


class Engine:
    def __init__(self, library: Library) -> None:
        self.library, self.gpu = library, library.cuda.current
        self.weights, self.refits = dict[str, NDArray[Any]](), 0
        library.open += 1
        library.deserialized += 1

    def __del__(self) -> None:
        self.library.open -= 1

    def get_device_memory_size_for_profile_v2(self, _: int) -> int:
        return self.library.activations

    def get_tensor_location(self, _: str) -> Library.TensorLocation:
        return Library.TensorLocation.DEVICE

    def create_runtime_config(self) -> Configuration:
        return Configuration(self.library)

    def create_execution_context(self, configuration: Configuration) -> Context:
        assert self.gpu == self.library.cuda.current, "a plan is used where another GPU is the current one"
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        engine.library.contexts += 1
        self.gpu, self.engine, self.refits = engine.gpu, engine, engine.refits
        self.library, self.ran = engine.library, False
        self.profile: int | None = None
        self.arena = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.library.cuda.check_stream(stream)
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name not in self.addresses, "an address is set twice"
        self.addresses[name] = address
        return True

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert pointer % 256 == 0
        assert size >= self.library.activations
        self.arena = pointer

    def is_stream_capturable(self, _: int) -> bool:
        return self.library.capturable

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.library.cuda
        assert self.gpu == cuda.current, "a plan runs where another GPU is the current one"
        cuda.check_stream(stream)
        assert self.ran or cuda.recording is None, "a graph is recorded before the first run"
        self.ran = True
        arena = self.arena

        def work() -> None:
            cuda.check(cuda.device, arena, self.library.activations)
            inputs = {name: self._array(name, shape) for name, shape in self.shapes.items()}
            assert self.refits == self.engine.refits, "a context of before a refit is used"
            shift = sum(float(np.abs(own).sum()) for own in self.engine.weights.values())
            for name, value in self.library.network(inputs).items():
                if name in self.addresses:
                    self._array(name, value.shape)[...] = value + shift if self.library.weighted else value

        cuda.queue(work)
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(self.library.dtypes[name])
        size = math.prod(shape) * dtype.itemsize
        self.library.cuda.check(self.library.cuda.device, self.addresses[name], size)
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(memoryview(memory), dtype).reshape(shape)
