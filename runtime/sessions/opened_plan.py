"""A plan, deserialized: TensorRT, its lean runtime and TensorRT-RTX alike."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import BackendError
from calotype.runtime.graphs.files import initializer_names
from calotype.runtime.sessions.device import Device
from calotype.runtime.sessions.libraries import Library
from calotype.runtime.sessions.plans import read_plan
from calotype.runtime.sessions.private import read_private, write_private
from calotype.runtime.sessions.records import PlanRecord

Overrides = Mapping[str, NDArray[np.floating[Any]]]
SHA256 = 32  # bytes


class OpenedPlan:
    """The plan ``path`` on ``device``; its weights are those of ``graph`` where it was built without, or overridden.

    ``weights`` is the file that those of ``graph`` lie in.

    Raises:
        BuildError: the plan is not what its record says; nothing is deserialized then.
        BackendError: the library refuses it, or its weights cannot be changed.
    """

    def __init__(
        self,
        library: Library,
        device: Device,
        path: Path,
        record: PlanRecord,
        *,
        graph: Path,
        weights: Path,
        overrides: Overrides | None,
    ) -> None:
        self._library, self._device = library, device
        self._graph, self._weights, self._stripped = graph, weights, bool(record.key["stripped"])
        self._changed = frozenset[str]()
        data = read_plan(path, record)
        self._mark = library.logger.mark()
        self._runtime = library.api.Runtime(library.logger)
        if record.key["version_compatible"]:
            self._runtime.engine_host_code_allowed = True  # such plans bring their own runtime; this one we built
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BackendError(self.complaint(f"open {path.name}"))
        if self._stripped:
            self._put_in(overrides or {}, all_of_them=True)
        elif overrides:
            raise BackendError(
                f"the weights in {path.name} cannot be changed, as a LoRA needs; build one whose weights can be "
                f"changed: calotype build BUNDLE --backend {library.name} --strip-weights"
            )
        self._kernels = path.with_name(path.name + ".jit")
        self._configuration = self._configure()

    def activations(self, profile: int) -> int:
        """Bytes of the arena at the profile's largest shapes."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def is_on_host(self, tensor: str) -> bool:
        """Whether the engine reads the input on the host: shapes depend on its values."""
        return bool(self._engine.get_tensor_location(tensor) == self._library.api.TensorLocation.HOST)

    def create_context(self, profile: int) -> Any:
        """A context for one shape of a profile, without memory of its own for activations.

        One a shape: a captured graph holds on to the state of its context.
        """
        context = self._engine.create_execution_context(self._configuration)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise BackendError(self.complaint("make an execution context"))
        return context

    def complaint(self, what: str) -> str:
        """One line on why the library could not do ``what``, and the way out."""
        reason, self._mark = self._library.logger.first(self._mark), self._library.logger.mark()
        if "memory" in reason.lower():
            free = self._device.cuda.free_memory() / 2**20
            advice = f"{free:.0f} MiB are free; use a smaller size, --low-memory, or a plan with a smaller profile"
        else:
            advice = f"build it again here with: calotype build BUNDLE --backend {self._library.name} --force"
        return f"{self._library.name} {self._library.version} cannot {what}: {reason}; {advice}"

    def close(self) -> None:
        """Keep what was compiled while running, and give the rest back. Contexts must be gone."""
        if self._library.name == "tensorrt-rtx":
            data = bytes(self._configuration.get_runtime_cache().serialize())
            with contextlib.suppress(OSError):  # a full disk costs the next start some seconds, no more
                write_private(self._kernels, hashlib.sha256(data).digest() + data)
        # In this order: each holds a bare pointer to the next.
        del self._configuration, self._engine, self._runtime

    def _configure(self) -> Any:
        """What contexts are made with: memory is ours; and TensorRT-RTX compiles kernels for a shape at once, since
        a captured graph would keep the slower ones it starts with, and keeps them on disk.
        """
        api = self._library.api
        if self._library.name != "tensorrt-rtx":
            return api.ExecutionContextAllocationStrategy.USER_MANAGED
        configuration = self._engine.create_runtime_config()
        configuration.set_execution_context_allocation_strategy(api.ExecutionContextAllocationStrategy.USER_MANAGED)
        configuration.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED
        strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        configuration.dynamic_shapes_kernel_specialization_strategy = strategy
        cache = configuration.create_runtime_cache()
        with contextlib.suppress(OSError):
            data = read_private(self._kernels)
            if hashlib.sha256(data[SHA256:]).digest() == data[:SHA256]:
                cache.deserialize(data[SHA256:])  # refused, and made anew, when it is from another GPU or driver
        configuration.set_runtime_cache(cache)
        return configuration

    def refit(self, overrides: Overrides) -> None:
        """Put the bundle's own weights in where others are, and ``overrides``; the rest is neither read nor copied.

        Contexts and captured graphs must be gone. When this fails, the plan has some weights of either, and is of no
        use any more.

        Raises:
            BackendError: the plan's weights cannot be changed, or not to these.
        """
        if not self._stripped:
            raise BackendError("the weights in this plan cannot be changed; build it with --strip-weights")
        self._put_in(overrides, all_of_them=False)

    def _put_in(self, overrides: Overrides, *, all_of_them: bool) -> None:
        api, logger = self._library.api, self._library.logger
        if not hasattr(api, "OnnxParserRefitter"):
            raise BackendError("the lean runtime cannot put weights into a plan; build it without --strip-weights")
        refitter, own = api.Refitter(self._engine, logger), SafetensorsFile(self._weights)
        if all_of_them and not api.OnnxParserRefitter(refitter, logger).refit_from_file(str(self._graph)):
            raise BackendError(self.complaint(f"read the weights of {self._graph.name}"))
        names = set(refitter.get_all_weights())
        fixed = sorted((overrides.keys() & initializer_names(self._graph)) - names)
        if fixed:  # or the picture would be drawn with a part of the LoRA
            raise BackendError(self.complaint(f"change the weights {', '.join(fixed[:3])}, which a LoRA changes"))
        changed = frozenset(overrides.keys() & names)
        arrays = {name: overrides[name] for name in changed} | {name: own[name] for name in self._changed - changed}
        kept = [self._set(refitter, name, array) for name, array in arrays.items()]
        if not all_of_them:  # weights that were put together in one kernel are given together
            partners = [name for name in refitter.get_missing_weights() if name in own and name not in arrays]
            kept += [self._set(refitter, name, own[name]) for name in partners]
        done = refitter.refit_cuda_engine_async(self._device.stream)
        self._device.cuda.synchronize(self._device.stream)
        del kept
        if not done:
            missing = ", ".join(refitter.get_missing_weights()[:3])
            raise BackendError(self.complaint(f"put the weights in ({missing or 'none are missing'})"))
        self._changed = changed

    def _set(self, refitter: Any, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """Give a weight; the array is to be kept until the refit is done, since the library reads it in place."""
        array = np.ascontiguousarray(value)
        if not refitter.set_named_weights(name, self._library.api.Weights(array)):
            raise BackendError(self.complaint(f"change the weights {name}"))
        return array
