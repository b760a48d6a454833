"""ONNX Runtime on the CPU, with inputs and outputs bound to our own buffers."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import BackendError, MissingPackageError
from calotype.runtime.sessions.session import Sizes
from calotype.runtime.spec import ModelSpec, TensorSpec

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingPackageError("onnxruntime", "cpu") from error


class OnnxRuntimeCpuSession:
    """See :class:`calotype.runtime.sessions.session.Session`."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.inputs, self.outputs = spec.inputs, spec.outputs
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                folder / spec.graphs["float32"], options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library's own exceptions have no common class but this
            raise BackendError(f"ONNX Runtime cannot open {spec.graphs['float32']}: {error}") from error
        self._memory: dict[str, NDArray[Any]] = {}
        self._views: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}
        self._bindings: dict[tuple[tuple[int, ...], ...], Any] = {}

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`."""
        for spec in (*self.inputs, *self.outputs):
            count = spec.count(sizes)
            if spec.name not in self._memory or self._memory[spec.name].size < count:
                self._memory[spec.name] = np.zeros(count, spec.dtype)
                self._views.clear()
                self._bindings.clear()

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        return self._view(self._spec(name), sizes)

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        key = tuple(spec.resolve(sizes) for spec in self.inputs)
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bindings[key] = self._bind(sizes)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed at {dict(sizes)}: {error}") from error

    def close(self) -> None:
        """See :meth:`Session.close`."""
        self._bindings.clear()
        self._views.clear()
        self._memory.clear()
        del self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)

    def _view(self, spec: TensorSpec, sizes: Sizes) -> NDArray[Any]:
        shape = spec.resolve(sizes)
        view = self._views.get((spec.name, shape))
        if view is None:
            memory = self._memory[spec.name]
            view = self._views[spec.name, shape] = memory[: spec.count(sizes)].reshape(shape)
        return view

    def _bind(self, sizes: Sizes) -> Any:
        binding = self._session.io_binding()
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                view = self._view(spec, sizes)
                bind(spec.name, "cpu", 0, view.dtype, view.shape, view.ctypes.data)
        return binding
