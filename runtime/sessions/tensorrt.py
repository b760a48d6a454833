"""Plans of TensorRT and TensorRT-RTX, run from pinned buffers; a step is one launch of a CUDA graph."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calotype.runtime.bundle.form import Form, default_form
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.sessions.libraries import load_library
from calotype.runtime.sessions.opened_plan import OpenedPlan
from calotype.runtime.sessions.plans import WantedOnGpu, find_plans
from calotype.runtime.sessions.records import PlanRecord
from calotype.runtime.sessions.session import Changes, Sizes, read_all
from calotype.runtime.sessions.staged import StagedSession, StagedShape, most_rows

PLANS_SHARE = 1 / 2  # of the GPU's memory, for plans that are kept open beside the one in use

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class _Shape(StagedShape):
    """One set of sizes, ready to run.

    Attributes:
        plan: the number of the plan that runs it.
        activations: bytes of the arena.
        arena: the generation of the arena that its context and graph know; -1 before the first run.
        graph: the network and the copies of its outputs in one; None where the network cannot be captured.
    """

    plan: int
    context: Any
    activations: int
    capturable: bool
    arena: int = -1
    graph: Any = None


def serving_plans(
    folder: Path, spec: ModelSpec, backend: str, version: str, gpu: str, driver: str, form: Form | None = None
) -> list[tuple[Path, PlanRecord]]:
    """The plans that run the network here, in ``form`` where one is named, the newest first.

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
        precision=None if form is None else str(form),
    )
    found, refusal = find_plans(wanted)
    if not found:
        graph = next(iter(spec.graphs.values()))
        raise BackendError(
            f"{backend} has no plan of {graph}{'' if form is None else f' in {form}'} for this machine; "
            f"build one with: calotype build {folder} --backend {backend}"
            + ("" if form is None else f" --precision {form}")
            + (f" ({refusal})" if refusal else "")
        )
    return found


class TensorRtSession(StagedSession[_Shape]):
    """See :class:`calotype.runtime.sessions.session.Session`. The plan and profile that fit a shape best run it.

    Raises:
        BackendError: there is no GPU or no plan, or the plan cannot be opened.
        BuildError: the plan is not what its record says.
        MissingPackageError: the library is not installed.
    """

    most_shapes = 32

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        backend: str,
        overrides: Changes | None = None,
        *,
        form: Form | None = None,
        device: int | None = None,
    ) -> None:
        # The device comes before the library, which crashes where there is no driver.
        super().__init__(spec.inputs, spec.outputs, next(iter(spec.graphs.values())), backend=backend, device=device)
        self._folder, self._spec = folder, spec
        self._rows = "rows" if "rows" in self._symbols else "batch"
        self._opened: OrderedDict[int, OpenedPlan] = OrderedDict()
        self._capacities: dict[tuple[tuple[str, int], ...], int] = {}
        try:
            self._library = load_library(backend)
            gpu = self._device.gpu
            self._library.check_gpu(gpu)
            self._plans = serving_plans(folder, spec, backend, self._library.version, gpu.identity, gpu.driver, form)
            if overrides:  # a plan with weights of its own would refuse them
                self._plans = [plan for plan in self._plans if plan[1].key["stripped"]] or self._plans
            self._overrides = read_all(overrides or {})  # several plans may be given them, at any time
            usual = [number for number in range(len(self._plans)) if not self._is_unusual(number)]
            self._plan(usual[0] if usual else 0)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Path | None:
        """See :attr:`Session.engine`. The one that was used last."""
        return self._plans[next(reversed(self._opened))][0] if self._opened else None

    @property
    def own_bytes(self) -> int:
        """See :attr:`Session.own_bytes`. Of the plans that are open, on the GPU."""
        return sum(map(self._weight, self._opened))

    @property
    def refits(self) -> bool:
        """See :attr:`Session.refits`."""
        return all(record.key["stripped"] for _, record in self._plans)

    def capacity(self, sizes: Sizes) -> int:
        """See :meth:`Session.capacity`. The most that a profile for the size has, of those that runs have."""
        key = tuple(sizes.items())
        if key not in self._capacities:
            most = [
                _sizes(self.inputs, profile, 2)[self._rows]
                for _, record in self._plans
                for profile in _profiles(record)
            ]
            fitting = [rows for rows in most if self._fitting({**sizes, self._rows: rows})]
            self._capacities[key] = most_rows(max(fitting, default=0))
        return self._capacities[key]

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`."""
        shape = self._at(sizes)
        with self._device.lock:
            self._copy_in(shape)
            self._ready(shape)

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        shape, device = self._at(sizes), self._device
        with device.lock:
            self._copy_in(shape)
            self._ready(shape)
            if shape.graph is None:
                self._enqueue(shape)
            else:
                device.cuda.launch(shape.graph, device.stream)
            device.cuda.synchronize(device.stream)

    def set_weights(self, changes: Changes | None) -> None:
        """See :meth:`Session.set_weights`. The changed weights alone are read and copied, in each open plan."""
        self._check_usable()
        overrides = read_all(changes or {})
        with self._device.lock:
            self._device.cuda.use()
            self._forget_all()  # a context and a captured graph may hold what weights were
            try:
                for opened in self._opened.values():
                    opened.refit(overrides)
            except BaseException:
                self._make_room(0)  # they open anew, with the weights of before
                raise
            self._overrides = overrides

    def _close(self) -> None:
        with self._device.lock:
            self._forget_all()
            while self._opened:
                self._shut(next(iter(self._opened)))
        super()._close()

    def _plan(self, number: int) -> OpenedPlan:
        """One of the plans, open; others that were not used for longest make room for it."""
        if number not in self._opened:
            room = int(self._device.gpu.memory * PLANS_SHARE) - self._weight(number)
            self._make_room(room)
            try:
                self._opened[number] = self._open(number)
            except BackendError:
                if not self._opened:
                    raise
                self._make_room(0)  # other programs have the rest of the memory
                self._opened[number] = self._open(number)
        self._opened.move_to_end(number)
        return self._opened[number]

    def _open(self, number: int) -> OpenedPlan:
        path, record = self._plans[number]
        graph = self._folder / self._spec.graphs[record.key["precision"]]
        self._device.cuda.use()
        weights = self._folder / self._spec.weights[0]
        return OpenedPlan(
            self._library, self._device, path, record, graph=graph, weights=weights, overrides=self._overrides
        )

    def _make_room(self, room: int) -> None:
        """Shut plans until the others take no more than ``room`` bytes."""
        while self._opened and sum(map(self._weight, self._opened)) > room:
            self._shut(next(iter(self._opened)))

    def _shut(self, number: int) -> None:
        for key, shape in list(self._shapes.items()):
            if shape.plan == number:
                self._drop(key)
        self._opened.pop(number).close()

    def _weight(self, number: int) -> int:
        """About how much of the GPU's memory an open plan takes, in bytes."""
        record = self._plans[number][1]
        return max(record.size, int(record.figures.get("weights", 0)))

    def _is_unusual(self, number: int) -> bool:
        """Whether a plan is in another form than the backend is fast in."""
        usual = default_form(self._spec, self._library.name)
        return bool(self._plans[number][1].key["precision"] != str(usual))

    def _forget(self, shape: _Shape) -> None:
        if shape.graph is not None:
            self._device.cuda.destroy_graph(shape.graph)
        shape.graph = shape.context = None
        super()._forget(shape)

    def _choose(self, sizes: Sizes) -> tuple[int, int, Sizes]:
        """(plan, profile, sizes that it runs): one tuned for this shape, else the one with the least room.

        The newest of equals; where none has so few rows, those with the fewest more.
        """
        fewest = {
            _sizes(self.inputs, profile, 0)[self._rows] for _, record in self._plans for profile in _profiles(record)
        }
        for rows in (sizes[self._rows], *sorted(count for count in fewest if count > sizes[self._rows])):
            run = {**sizes, self._rows: rows}
            fitting = self._fitting(run)
            if fitting:
                return *min(fitting)[3:], run
        raise InputError(self._misfit(sizes))

    def _fitting(self, sizes: Sizes) -> list[tuple[bool, bool, int, int, int]]:
        """(in another form than is fast, not tuned for this shape, room, plan, profile) of all that run it."""
        wanted = {spec.name: spec.resolve(sizes) for spec in self.inputs}
        fitting = []
        for index, (_, record) in enumerate(self._plans):
            for number, profile in enumerate(_profiles(record)):
                if all(_within(wanted[name], *profile[name]) for name in wanted):
                    tuned = all(wanted[name] == tuple(profile[name][1]) for name in wanted)
                    room = sum(math.prod(profile[name][2]) for name in wanted)
                    fitting.append((self._is_unusual(index), not tuned, room, index, number))
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

    def _prepare(self, sizes: Sizes) -> _Shape:
        self._device.cuda.use()
        number, profile, run = self._choose(sizes)
        if self._links and run != sizes:
            raise BackendError(
                f"{self._name} has no plan for {self._rows}={sizes[self._rows]}, and what it is linked to has no more; "
                f"build one with: calotype build {self._folder} --backend {self._library.name} --batch …"
            )
        opened = self._plan(number)
        context, staged, capturable = opened.create_context(profile), self._stage(run), True
        try:
            for spec in (*self.inputs, *self.outputs):
                address, shape = staged.addresses[spec.name], staged.views[spec.name].shape
                if spec in self.inputs and opened.is_on_host(spec.name):
                    address, capturable = staged.staging.host(spec.name), False
                    del staged.copies_in[spec.name]
                if spec in self.inputs and not context.set_input_shape(spec.name, shape):
                    raise BackendError(opened.complaint(f"take {spec.name} in the shape {shape}"))
                if not context.set_tensor_address(spec.name, address):
                    raise BackendError(opened.complaint(f"bind {spec.name}"))
        except BaseException:
            staged.staging.close()
            raise
        staged.views = {
            name: view if name in self._links else view[tuple(map(slice, self._tensors[name].resolve(sizes)))]
            for name, view in staged.views.items()
        }
        return _Shape(
            **vars(staged),
            plan=number,
            context=context,
            activations=opened.activations(profile),
            capturable=capturable,
        )

    def _ready(self, shape: _Shape) -> None:
        """Run once, then record the graph; again when the arena has moved since."""
        device = self._device
        device.grow(shape.activations)
        if shape.arena == device.generation:
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
        shape.arena = device.generation

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
        self._device.cuda.use()
        if not shape.context.execute_async_v3(self._device.stream):
            raise BackendError(self._opened[shape.plan].complaint("run the plan"))
        self._copy_out(shape)


def _profiles(record: PlanRecord) -> list[Mapping[str, Any]]:
    """The (smallest, best, largest) shapes of every input, by profile."""
    found: list[Mapping[str, Any]] = record.tensors["profiles"]
    return found


def _sizes(inputs: Sequence[TensorSpec], profile: Mapping[str, Any], which: int) -> dict[str, int]:
    """The symbols' sizes at a profile's smallest (0), best (1) or largest (2) shapes."""
    found: dict[str, int] = {}
    for spec in inputs:
        found |= spec.sizes(profile[spec.name][which])
    return found


def _within(shape: tuple[int, ...], least: list[int], _: list[int], most: list[int]) -> bool:
    return all(low <= size <= high for size, low, high in zip(shape, least, most, strict=True))
