"""Stand-ins for a GPU and its libraries that compute, on the CPU: ``install()`` puts them in place of the real ones.

The GPU's memory is that of ``tests/runtime/cuda_standin.py``, which is real memory, so ONNX Runtime's CPU kernels read
and write it: for the session on CUDA the graph as it was rewritten for it, and for plans, of which none is built here,
the bundle's own graph. So whatever is written for a GPU runs to its end, and its assertions hold or fail. What a GPU
computes, or how fast, nothing here says.

As a pytest plugin (``-p tests.computing_standins``) it lets ``tests/gpu`` run where there is no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from calotype.engine import build
from calotype.engine.cache import Built
from calotype.engine.profiles import Shapes
from calotype.runtime import sessions
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.graphs.files import initializer_names
from calotype.runtime.sessions import onnxruntime_cuda
from tests.runtime import cuda_standin
from tests.runtime.standard_operators import in_standard_operators

GPU_MEMORY = 256 << 20


class Binding:
    """ONNX Runtime's own, to which the stand-in's GPU memory is the host's."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, device: str, *where: Any) -> None:
        assert device == "cuda"
        self.real.bind_input(name, "cpu", *where)

    def bind_output(self, name: str, device: str, *where: Any) -> None:
        assert device == "cuda"
        self.real.bind_output(name, "cpu", *where)


class InferenceSession:
    """A graph that was made for CUDA, on the CPU."""

    def __init__(self, model: bytes, options: Any, providers: Any, enable_fallback: int) -> None:
        assert providers[0][0] == "CUDAExecutionProvider"
        standard = in_standard_operators(model)
        self.real = onnxruntime.InferenceSession(standard, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return OnnxRuntime.get_available_providers()

    def io_binding(self) -> Binding:
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self.real.run_with_iobinding(binding.real, options)


class OnnxRuntime:
    """What stands for ``onnxruntime`` with CUDA."""

    SessionOptions, RunOptions, OrtValue = onnxruntime.SessionOptions, onnxruntime.RunOptions, onnxruntime.OrtValue
    InferenceSession = InferenceSession

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


class TensorRt(cuda_standin.Library):
    """What stands for ``tensorrt`` and ``tensorrt_rtx``: a plan is run by the graph that has its inputs."""

    Builder = None  # nothing is built, but it could be

    def __init__(self, cuda: cuda_standin.Cuda, bundle: Bundle) -> None:
        self.folder = bundle.path
        networks = {name: spec for name, spec in bundle.manifest.networks.items() if name not in ASIDE}
        self.networks = {frozenset(item.name for item in spec.inputs): spec for spec in networks.values()}
        dtypes = {item.name: item.dtype for spec in networks.values() for item in (*spec.inputs, *spec.outputs)}
        self.opened: dict[tuple[str, int], onnxruntime.InferenceSession] = {}
        super().__init__(cuda, self.compute, dtypes)

    def compute(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        spec = self.networks[frozenset(inputs)]
        names = [item.name for item in spec.outputs]
        return dict(zip(names, self._session(spec).run(names, dict(inputs)), strict=True))

    def _session(self, spec: ModelSpec) -> onnxruntime.InferenceSession:
        """One for the weights that were put in last."""
        graph = self.folder / spec.graphs["float16"]
        key = graph.name, id(self.refitted)
        if key not in self.opened:
            options = onnxruntime.SessionOptions()
            changed = [name for name in self.refitted if name in initializer_names(graph)]
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(self.refitted[name]) for name in changed]
            options.add_external_initializers(changed, values)
            self.opened[key] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return self.opened[key]


def plan(_: Any, graph: Path, profiles: Sequence[Shapes], **__: Any) -> Built:
    """A few bytes, with the record that a build would make."""
    shapes = [{name: [list(shape) for shape in bounds] for name, bounds in item.items()} for item in profiles]
    return Built(plan=graph.name.encode(), tensors={"profiles": shapes}, figures={})


def install() -> cuda_standin.Cuda:
    """Put all of them in place, for good; the GPU that they share."""
    cuda = cuda_standin.Cuda()
    cuda.limit = GPU_MEMORY
    modules: dict[str, Any] = sys.modules  # type: ignore[assignment]
    modules["cuda.bindings.runtime"] = cuda
    for name in ("tensorrt", "tensorrt_rtx"):
        modules[name] = TensorRt(cuda, Bundle.open("talbot"))
    onnxruntime_cuda.onnxruntime = OnnxRuntime
    sessions._onnxruntime_has_cuda = lambda: True
    build.build_plan = plan  # type: ignore[assignment]
    return cuda


def pytest_configure() -> None:
    """As a plugin."""
    install()
