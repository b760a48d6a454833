"""Plans of TensorRT and TensorRT-RTX, run from pinned buffers; a step is one launch of a CUDA graph."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.sessions.device import Staging, acquire, release
from calotype.runtime.sessions.libraries import load_library
from calotype.runtime.sessions.opened_plan import OpenedPlan, Overrides
from calotype.runtime.sessions.plans import WantedOnGpu, find_plans
from calotype.runtime.sessions.records import PlanRecord
from calotype.runtime.sessions.session import Sizes

MOST_SHAPES = 8  # kept ready at once, a context and a graph each

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class _Shape:
    """One set of sizes, ready to run.

    Attributes:
        copies_in: (GPU address, host address, bytes) of the inputs that the engine reads on the GPU.
        copies_out: (host address, GPU address, bytes).
        activations: bytes of the arena.
        generation: of the arena its context and graph know; -1 before the first run.
        graph: copies and network in one; None where the network cannot be captured.
    """

    views: Mapping[str, NDArray[Any]]
    context: Any
    copies_in: list[tuple[int, int, int]]
    copies_out: list[tuple[int, int, int]]
    activations: int
    capturable: bool
    generation: int = -1
    graph: Any = None


def serving_plans(
    folder: Path, spec: ModelSpec, backend: str, version: str, gpu: str, driver: str
) -> list[tuple[Path, PlanRecord]]:
    """The plans that run the network here, the newest first.

    Raises:
        BackendError: there is none.
    """
    files = Manifest.read(folder).files
    wanted = WantedOnGpu(
        backend=backend,
        version=version,
        graphs=tuple(files[graph].sha256 for graph in spec.graphs.values()),
        weights=tuple(files[path].sha256 for path in spec.weights),
        gpu=gpu,
        driver=driver,
    )
    found, refusal = find_plans(wanted)
    if not found:
        graph = next(iter(spec.graphs.values()))
        raise BackendError(
            f"{backend} has no plan of {graph} for this machine; build one with: "
            f"calotype build {folder} --backend {backend}" + (f" ({refusal})" if refusal else "")
        )
    return found


class TensorRtSession:
    """See :class:`calotype.runtime.sessions.session.Session`. The plan and profile that fit a shape best run it.

    Raises:
        BackendError: there is no GPU or no plan, or the plan cannot be opened.
        BuildError: the plan is not what its record says.
        MissingPackageError: the library is not installed.
    """

    def __init__(self, folder: Path, spec: ModelSpec, backend: str, overrides: Overrides | None = None) -> None:
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self._folder, self._spec, self._overrides = folder, spec, overrides
        self._shapes: OrderedDict[tuple[tuple[str, int], ...], _Shape] = OrderedDict()
        self._opened: OpenedPlan | None = None
        self._staging: Staging | None = None
        self._device = acquire(backend)  # before the library, which crashes where there is no driver
        try:
            self._library = load_library(backend)
            gpu = self._device.gpu
            self._library.check_gpu(gpu)
            self._plans = serving_plans(folder, spec, backend, self._library.version, gpu.identity, gpu.driver)
            if overrides:  # a plan with weights of its own would refuse them
                self._plans = [plan for plan in self._plans if plan[1].key["stripped"]] or self._plans
            self._open(0)
        except BaseException:
            self.close()
            raise

    def takes(self, sizes: Sizes) -> bool:
        """See :meth:`Session.takes`. Where a profile has the rows."""
        return bool(self._fitting(sizes))

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`; the first run, which is slow, is done here."""
        shape = self._at(sizes)
        with self._device.lock:
            self._ready(shape)

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        return self._at(sizes).views[name]

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        shape, device = self._at(sizes), self._device
        with device.lock:
            self._ready(shape)
            if shape.graph is None:
                self._enqueue(shape)
            else:
                device.cuda.launch(shape.graph, device.stream)
            device.cuda.synchronize(device.stream)

    def close(self) -> None:
        """See :meth:`Session.close`."""
        self._shut()
        release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, index: int) -> None:
        """Open one of the plans, with buffers for the largest shapes of all its profiles."""
        self._shut()
        path, record = self._plans[index]
        graph = self._folder / self._spec.graphs[record.key["precision"]]
        counts: dict[str, int] = {}
        for profile in record.tensors["profiles"]:
            sizes = self._largest(profile)
            for spec in (*self.inputs, *self.outputs):
                counts[spec.name] = max(counts.get(spec.name, 0), spec.count(sizes))
        self._index = index
        try:
            self._opened = OpenedPlan(self._library, self._device, path, record, graph=graph, overrides=self._overrides)
            self._staging = Staging(self._device, (*self.inputs, *self.outputs), counts)
        except BaseException:
            self._shut()
            raise

    def _shut(self) -> None:
        while self._shapes:
            self._forget(self._shapes.popitem()[1])
        if self._staging is not None:
            self._staging.close()
        if self._opened is not None:
            self._opened.close()
        self._staging = self._opened = None

    def _forget(self, shape: _Shape) -> None:
        if shape.graph is not None:
            self._device.cuda.destroy_graph(shape.graph)
        shape.graph = shape.context = None

    def _largest(self, profile: Mapping[str, Any]) -> dict[str, int]:
        """The symbols' sizes at a profile's largest shapes."""
        found = {}
        for spec in self.inputs:
            for dimension, size in zip(spec.shape, profile[spec.name][2], strict=True):
                factor, _, symbol = str(dimension).rpartition("*")
                found[symbol] = size // int(factor or 1)
        return found

    def _at(self, sizes: Sizes) -> _Shape:
        key = tuple(sizes.items())
        shape = self._shapes.get(key)
        if shape is None:
            index, profile = self._choose(sizes)
            if index != self._index or self._opened is None:
                self._open(index)
            shape = self._shapes[key] = self._prepare(sizes, profile)
            if len(self._shapes) > MOST_SHAPES:
                self._forget(self._shapes.popitem(last=False)[1])
        return shape

    def _choose(self, sizes: Sizes) -> tuple[int, int]:
        """(plan, profile): one tuned for this shape, else the one with the least room; the newest of equals."""
        fitting = self._fitting(sizes)
        if not fitting:
            raise InputError(self._misfit(sizes))
        return min(fitting)[2:]

    def _fitting(self, sizes: Sizes) -> list[tuple[bool, int, int, int]]:
        """(not tuned for this shape, room, plan, profile) of all that run it."""
        wanted = {spec.name: spec.resolve(sizes) for spec in self.inputs}
        fitting = []
        for index, (_, record) in enumerate(self._plans):
            for number, profile in enumerate(record.tensors["profiles"]):
                if all(_within(wanted[name], *profile[name]) for name in wanted):
                    tuned = all(wanted[name] == tuple(profile[name][1]) for name in wanted)
                    room = sum(math.prod(profile[name][2]) for name in wanted)
                    fitting.append((not tuned, room, index, number))
        return fitting

    def _misfit(self, sizes: Sizes) -> str:
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        profiles = "; ".join(
            f"{profile['name']}: batch {profile['batch']}, {profile['height']} x {profile['width']} pixels"
            for _, record in self._plans
            for profile in record.key["profiles"]
        )
        return (
            f"{asked} (height and width in latents) is outside every profile of {self._library.name}'s plans "
            f"({profiles}); use a size inside one, or build one with: calotype build {self._folder} "
            f"--backend {self._library.name} --batch … --height … --width …"
        )

    def _prepare(self, sizes: Sizes, profile: int) -> _Shape:
        opened, staging = self._opened, self._staging
        assert opened is not None
        assert staging is not None
        context, views, capturable = opened.create_context(profile), {}, True
        copies_in, copies_out = [], []
        for spec in (*self.inputs, *self.outputs):
            view = views[spec.name] = staging.view(spec.name, spec.resolve(sizes))
            host, device = staging.host(spec.name), staging.device(spec.name)
            if spec in self.outputs:
                copies_out.append((host, device, view.nbytes))
            elif opened.is_on_host(spec.name):
                device, capturable = host, False
            else:
                copies_in.append((device, host, view.nbytes))
            if spec in self.inputs and not context.set_input_shape(spec.name, view.shape):
                raise BackendError(opened.complaint(f"take {spec.name} in the shape {view.shape}"))
            if not context.set_tensor_address(spec.name, device):
                raise BackendError(opened.complaint(f"bind {spec.name}"))
        return _Shape(
            views=views,
            context=context,
            copies_in=copies_in,
            copies_out=copies_out,
            activations=opened.activations(profile),
            capturable=capturable,
        )

    def _ready(self, shape: _Shape) -> None:
        """Run once, then record the graph; again when the arena has moved since."""
        device = self._device
        device.grow(shape.activations)
        if shape.generation == device.generation:
            return
        if shape.graph is not None:
            device.cuda.destroy_graph(shape.graph)
            shape.graph = None
        shape.context.set_device_memory(device.arena, shape.activations)
        self._enqueue(shape)
        device.cuda.synchronize(device.stream)
        # TensorRT-RTX alone can say that a network is not capturable; elsewhere a failure below does.
        asks = getattr(shape.context, "is_stream_capturable", None)
        if shape.capturable and (asks is None or asks(device.stream)):
            shape.graph = self._capture(shape)
        shape.generation = device.generation

    def _capture(self, shape: _Shape) -> Any:
        cuda, stream = self._device.cuda, self._device.stream
        cuda.begin_capture(stream)
        try:
            self._enqueue(shape)
            return cuda.end_capture(stream)
        except BackendError as error:
            cuda.abandon_capture(stream)
            logger.warning("%s cannot be captured, and runs slower without: %s", self._library.name, error)
            return None

    def _enqueue(self, shape: _Shape) -> None:
        cuda, stream = self._device.cuda, self._device.stream
        for target, source, size in shape.copies_in:
            cuda.copy_to_device(target, source, size, stream)
        if not shape.context.execute_async_v3(stream):
            assert self._opened is not None
            raise BackendError(self._opened.complaint("run the plan"))
        for target, source, size in shape.copies_out:
            cuda.copy_to_host(target, source, size, stream)


def _within(shape: tuple[int, ...], least: list[int], _: list[int], most: list[int]) -> bool:
    return all(low <= size <= high for size, low, high in zip(shape, least, most, strict=True))
