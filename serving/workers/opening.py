"""A worker's open models, and those that it is to open or warm: one after another, beside whatever it draws.

A model is loaded in a thread of its own, and then warmed between the steps of pictures, a part at a time: so a picture
of another model waits for one part at most, and what the parts take is measured while nothing else computes.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import choose_backend
from calotype.serving.errors import OutOfMemoryError
from calotype.serving.wording import said
from calotype.serving.workers.filters import Filter, load_filter
from calotype.serving.workers.memory import Footprint, Gauge, free_of_device, model_bytes
from calotype.serving.workers.messages import Closed, Observation, Open, OpenFailed, Ready, Size, Warm
from calotype.serving.workers.reporter import Reporter
from calotype.serving.workers.warming import sizes_of, warm
from calotype.serving.workers.works import Model

OPENING = 60.0  # seconds that loading a model, or a part of its warming, is predicted to take: a hang is ten times that
END = object()
logger = logging.getLogger(__name__)


class Openings:
    """See the module.

    Args:
        reporter: says what came of it.
        closing: is told of an open model before it is closed.

    Attributes:
        models: those that are open and warm, by name.
        bell: can be read from once a model that was being loaded is loaded; :meth:`advance` then goes on with it.
    """

    def __init__(self, reporter: Reporter, closing: Callable[[Model], None]) -> None:
        self.models: dict[str, Model] = {}
        self._reporter, self._closing = reporter, closing
        self._waiting: deque[Open | Warm] = deque()
        self._work: Iterator[None] | None = None  # of the first one
        self._now: Open | Warm | None = None
        self._wanted = True  # what it comes to
        self._load: Load | None = None
        self.bell, self._ring = multiprocessing.Pipe(duplex=False)

    @property
    def what(self) -> str:
        """What is being done, for logs; "" where nothing is."""
        return "" if self._now is None else f"{type(self._now).__name__.lower()} {self._now.name}"

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded, in another thread."""
        return self._load is not None and not self._load.done

    @property
    def pending(self) -> bool:
        """Whether :meth:`advance` has something to do."""
        return (self._now is not None or bool(self._waiting)) and not self.loading

    def order(self, order: Open | Warm) -> None:
        """Open or warm a model in its turn; one that is opened anew is closed now."""
        if isinstance(order, Open):
            self._drop(order.name)
        self._waiting.append(order)

    def close(self, name: str) -> None:
        """Close a model, or leave off opening it."""
        self._drop(name)
        self._reporter.say(Closed(name=name))

    def advance(self) -> None:
        """Do one part of what is to be done."""
        if self._work is None:
            if not self._waiting:
                return
            order = self._now = self._waiting.popleft()
            self._wanted = True
            self._work = self._open(order) if isinstance(order, Open) else self._warm_again(order)
        if next(self._work, END) is END:
            self._work = self._now = None

    def _drop(self, name: str) -> None:
        self._waiting = deque(order for order in self._waiting if order.name != name)
        if self._now is not None and self._now.name == name:
            self._wanted = False
        model = self.models.pop(name, None)
        if model is not None:
            self._closing(model)
            model.pipeline.close()

    def _open(self, order: Open) -> Iterator[None]:
        """Load a model and warm it; yields where something else may go first."""
        begin = time.perf_counter()
        self._load = Load(order, self._ring)
        while not self._load.done:
            yield
        load, self._load = self._load, None
        self.bell.recv()
        if load.pipeline is None:
            if self._wanted:
                self._reporter.say(OpenFailed(name=order.name, number=order.number, why=load.why))
            return
        try:
            model = Model.of(order.name, order.number, load.pipeline)
            for observation in order.known:
                self._reporter.costs.observe(*observation)
            model.controls, model.filter = tuple(order.controls), load.filter
            model.hidden = order.safety_checker or load.filter is not None
            yield from self._warm(model, order.sizes or sizes_of(model.pipeline.manifest), begin, known=order.known)
        except Exception as error:
            load.pipeline.close()
            if self._wanted:
                self._reporter.say(OpenFailed(name=order.name, number=order.number, why=said(error)))
            return
        if not self._wanted:
            load.pipeline.close()

    def _warm_again(self, order: Warm) -> Iterator[None]:
        model = self.models.get(order.name)
        if model is None:
            return
        try:
            yield from self._warm(model, order.sizes, time.perf_counter())
        except Exception as error:  # the model is as open as before, or was closed meanwhile
            if self._wanted:
                logger.error("%s cannot be warmed: %s", order.name, error)

    def _warm(
        self, model: Model, sizes: Sequence[Size], begin: float, *, known: Sequence[Observation] = ()
    ) -> Iterator[None]:
        """Warm ``model`` at ``sizes``, a part at a time, and say that it is ready and what its parts take."""
        points = []
        for size in sizes:
            parts, gauge = warm(model.name, model.pipeline, size, model.controls, known=bool(known)), Gauge()
            while self._wanted:
                self._reporter.running(f"warm {model.name}", OPENING)
                with gauge.part():
                    part = next(parts, None)
                if part is None:
                    break
                observation, drawn = part
                if drawn is not None:
                    model.previews.learn(*drawn)
                self._reporter.tell([], [observation])
                yield
            if model.pipeline.backend == "cpu" and not known:
                points.append((size[0] * size[1], gauge.most))
        if self._wanted:
            self.models[model.name] = model
            self._reporter.say(
                Ready(
                    name=model.name,
                    number=model.number,
                    backend=model.pipeline.backend,
                    seconds=time.perf_counter() - begin,
                    footprint=Footprint(points=tuple(points)),
                )
            )


class Load:
    """A model that is being loaded in a thread of its own, which rings at its end.

    Attributes:
        done: whether it has come to an end; then ``pipeline`` is the open model, or ``why`` says why there is none.
        filter: what its pictures have to pass; None is nothing.
    """

    def __init__(self, order: Open, ring: Connection) -> None:
        self.done = False
        self.pipeline: Pipeline | None = None
        self.filter: Filter | None = None
        self.why = ""
        threading.Thread(target=self._run, args=(order, ring), name=f"open {order.name}", daemon=True).start()

    def _run(self, order: Open, ring: Connection) -> None:
        try:
            self.filter = load_filter(order.output_filter) if order.output_filter else None
            _check_fits(order)
            self.pipeline = load_model(order)
        except Exception as error:
            logger.error("%s cannot be opened: %s", order.name, error)  # with all paths, for the operator
            self.why = said(error)
        self.done = True
        ring.send(None)


def load_model(order: Open) -> Pipeline:
    """The open model that ``order`` is of; raises a CalotypeError where it cannot be opened."""
    return Pipeline.load(
        order.bundle,
        order.backend,
        low_memory=order.low_memory,
        loras=order.loras,
        embeddings=order.embeddings,
        controls=order.controls,
        safety_checker=order.safety_checker,
        vae=order.vae,
        vae_tiles=order.tiles,
        fast=order.fast,
        threads=order.threads,
        device=order.device,
        sha256=order.sha256,
    )


def _check_fits(order: Open) -> None:
    """Raises OutOfMemoryError where a model takes more memory than is free, before it does."""
    bundle = Bundle.open(order.bundle, weights=False)
    backend = choose_backend(order.backend, bundle.path, order.device)
    needed, free = model_bytes(bundle, backend, low_memory=order.low_memory), free_of_device(backend, order.device)
    for folder in order.controls.values():
        needed += model_bytes(Bundle.open(folder, weights=False), backend, low_memory=False)
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{order.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; unload another model, or "
            "open it with low_memory"
        )
