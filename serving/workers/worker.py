"""A worker: the process that owns the open models of one device, and draws with them in one loop.

``python -m calotype.serving.workers.worker NUMBER`` with the number of an open socket, over which it is told what to do
and says what it does; it ends when that is closed. Everything happens in its main thread: take orders, ask the batcher
what is next, do it, say what came of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.denoising.job import Key
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import choose_backend
from calotype.serving.errors import (
    DeadlineError,
    NotReadyError,
    OutOfMemoryError,
    ServingError,
)
from calotype.serving.tasks import Event, Started, Stepped
from calotype.serving.wording import said
from calotype.serving.workers import batcher as batching
from calotype.serving.workers.batcher import Batcher, Expire, Finish, Prepare, Run, area_of, network_of
from calotype.serving.workers.costs import DECODE, ENCODE, SWITCH, TEXT, Costs
from calotype.serving.workers.memory import Footprint, forget_peak, free_of_device, model_bytes, resident
from calotype.serving.workers.messages import (
    Cancel,
    Closed,
    Failed,
    Happened,
    Memory,
    Observation,
    Open,
    OpenFailed,
    Order,
    Ready,
    Report,
    Running,
    Size,
    Skip,
    Stop,
    Submit,
    Unload,
    Warm,
)
from calotype.serving.workers.previews import denoised
from calotype.serving.workers.warming import sizes_of, warm
from calotype.serving.workers.works import Model, Work, drawn_of, failure_of, is_memory, spread

OPENING = 60.0  # seconds that opening a model is predicted to take: a hang is ten times that
# Their warnings quote prompts, which are in no log unless somebody asks for it.
QUOTING = ("calotype.runtime.preparation", "calotype.runtime.text")
LOST = "context is lost"  # of a GPU: nothing works in this process any more
logger = logging.getLogger(__name__)
T = TypeVar("T")


class Worker:
    """The loop of the process; see the module."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._models: dict[str, Model] = {}
        self._works: dict[str, Work] = {}
        self._costs = Costs()
        self._batcher = Batcher(self._costs, self)

    def capacity(self, model: str, key: Key) -> int:
        """See :class:`calotype.serving.workers.batcher.Engine`; what cannot be opened says so when it runs alone."""
        try:
            return self._models[model].pipeline.capacity(key)
        except Exception:
            return 0

    def padded(self, model: str, key: Key, rows: int) -> int:
        """See :class:`calotype.serving.workers.batcher.Engine`."""
        try:
            return self._models[model].pipeline.padded(key, rows)
        except Exception:
            return rows

    def kept(self, model: str, weights: Any) -> bool:
        """See :class:`calotype.serving.workers.batcher.Engine`; an outline knows no digests of LoRAs."""
        wanted, sessions = _plain(weights), self._models[model].pipeline.networks.sessions
        return any(_plain(key.weights) == wanted for key in sessions)

    def serve(self) -> None:
        """Work until told to stop, or until nobody is there any more."""
        while self._listen():
            match self._batcher.next(time.monotonic()):
                case Prepare(ids=ids, seconds=seconds):
                    for work in self._known(ids):
                        self._prepare(work, seconds / len(ids))
                case Run(ids=ids, seconds=seconds):
                    works = self._known(ids)
                    apart = [[work] for work in works if work.order.alone]
                    for group in ([work for work in works if not work.order.alone], *apart):
                        self._run(group, seconds)
                case Finish(ids=ids, seconds=seconds):
                    self._finish(self._known(ids), seconds)
                case Expire(ids=ids):
                    for work in self._known(ids):
                        self._fail(work, DeadlineError("its deadline has passed before it was drawn"))
                case None:
                    pass

    def _listen(self) -> bool:
        """Take the orders that are here, and wait for one where there is nothing to do; returns whether to go on."""
        while True:
            if not self._connection.poll():
                if self._batcher.ids:
                    return True
                self._rest()
            try:
                order: Order = self._connection.recv()
            except (EOFError, OSError):
                return False
            if isinstance(order, Stop):
                return False
            self._take(order)

    def _rest(self) -> None:
        """Give back what large pictures have taken, and say that nothing is left to do."""
        for model in self._models.values():
            if model.used:
                model.pipeline.trim()
                model.used = False
        now, peak = resident()
        self._say(Memory(resident=now, peak=peak))
        self._say(Running(ids=(), what="idle", seconds=0.0))

    def _take(self, order: Order) -> None:
        match order:
            case Submit():
                self._submit(order)
            case Cancel(id=id):
                self._batcher.remove(id)
                self._works.pop(id, None)
            case Skip(id=id):
                self._batcher.skip(id)
            case Open():
                self._open(order)
            case Warm(name=name, sizes=sizes):
                self._say_ready(self._models[name], sizes, time.perf_counter())
            case Unload(name=name):
                self._unload(name)

    def _submit(self, order: Submit) -> None:
        task = order.task
        model = self._models.get(task.model)
        if model is None:
            self._say(Failed(id=task.id, error=NotReadyError(f"{task.model} is not open any more")))
            return
        self._works[task.id] = Work(order=order, model=model)
        self._batcher.add(
            batching.Ticket(
                id=task.id,
                outline=order.outline,
                arrived=order.accepted,
                deadline=task.deadline,
                priority=task.priority,
            )
        )

    # The stages of a picture.

    def _prepare(self, work: Work, seconds: float) -> None:
        self._say(Running(ids=(work.id,), what="encode", seconds=seconds))
        task, pipeline = work.order.task, work.model.pipeline
        work.begun = begin = time.monotonic()
        known = set(pipeline.networks.sessions)
        job = self._tried(work, lambda: pipeline.prepare(task.request))
        if job is None:
            return
        work.job, work.model.used, work.encoded = job, True, time.monotonic()
        took = work.encoded - begin
        work.due = spread(task.previews, job.steps)
        name = work.model.name
        switched = any(key.weights for key in pipeline.networks.sessions if key not in known)
        seen = [Observation(name, SWITCH if switched else TEXT, 0, 1, took - job.picture_seconds)]
        if task.request.image is not None:
            seen.append(Observation(name, ENCODE, work.order.outline.area, 1, job.picture_seconds))
        self._batcher.prepared({work.id: job})
        self._tell([], seen)

    def _run(self, works: Sequence[Work], seconds: float) -> None:
        """One run of the denoising network; where it fails, each of ``works`` is tried alone."""
        jobs = {work.job: work for work in works if work.job is not None and not work.job.done}
        if not jobs:
            return
        ids, pipeline = tuple(work.id for work in jobs.values()), works[0].model.pipeline
        first = [(work.id, Started(steps=job.steps)) for job, work in jobs.items() if not work.first_run]
        if first:
            self._tell(first, [])
        self._say(Running(ids=ids, what="denoise", seconds=seconds))
        begin = time.monotonic()
        key, rows = next(iter(jobs)).key, sum(job.rows for job in jobs)
        for work in jobs.values():
            work.first_run = work.first_run or begin
        if len(jobs) == 1:
            moved = self._tried(works[0], lambda: pipeline.advance(list(jobs)))
        else:
            try:
                moved = pipeline.advance(list(jobs))
            except Exception as error:
                self._recover(pipeline, error)
                for work in jobs.values():
                    self._run([work], seconds)
                return
        self._batcher.moved(ids)
        if moved is None:
            return
        end = time.monotonic()
        events: list[tuple[str, Event]] = []
        for job, work in jobs.items():
            work.last_run = end
            if job in moved:
                shown = work.model.previews.show(denoised(job)) if job.step in work.due and not job.done else None
                events.append((work.id, Stepped(step=job.step, steps=job.steps, preview=shown)))
        self._tell(events, [Observation(works[0].model.name, network_of(key), area_of(key), rows, end - begin)])

    def _finish(self, works: Sequence[Work], seconds: float) -> None:
        if not works:
            return
        self._say(Running(ids=tuple(work.id for work in works), what="decode", seconds=seconds))
        for work in works:
            job, begin = work.job, time.monotonic()
            assert job is not None
            picture = self._tried(work, functools.partial(work.model.pipeline.finish, job))
            if picture is None:
                continue
            took = time.monotonic() - begin
            drawn = drawn_of(work, picture, took)
            work.model.previews.learn(job.latents, drawn.pixels)
            self._forget(work)
            self._tell([(work.id, drawn)], [Observation(work.model.name, DECODE, work.order.outline.area, 1, took)])

    def _tried(self, work: Work, action: Callable[[], T]) -> T | None:
        """What ``action`` gives; an exception is the end of ``work`` alone, and None."""
        try:
            return action()
        except Exception as error:
            self._recover(work.model.pipeline, error)
            self._fail(work, failure_of(error))
            return None

    def _recover(self, pipeline: Pipeline, error: Exception) -> None:
        """Leave nothing of a failure behind that the next picture would feel."""
        if LOST in str(error):
            raise error
        if is_memory(error):
            pipeline.trim()

    # Models.

    def _open(self, order: Open) -> None:
        self._say(Running(ids=(), what=f"open {order.name}", seconds=OPENING))
        begin = time.perf_counter()
        self._close(order.name)
        try:
            _check_fits(order)
            pipeline = Pipeline.load(
                order.bundle,
                order.backend,
                low_memory=order.low_memory,
                loras=order.loras,
                embeddings=order.embeddings,
                vae=order.vae,
                vae_tiles=order.tiles,
                fast=order.fast,
                threads=order.threads,
                device=order.device,
            )
        except Exception as error:
            logger.error("%s cannot be opened: %s", order.name, error)  # with all paths, for the operator
            self._say(OpenFailed(name=order.name, why=said(error)))
            return
        try:
            model = Model.of(order.name, pipeline)
            for observation in order.known:
                self._costs.observe(*observation)
            self._say_ready(model, order.sizes or sizes_of(pipeline.manifest), begin, known=bool(order.known))
        except Exception as error:
            pipeline.close()
            self._say(OpenFailed(name=order.name, why=said(error)))
            return
        self._models[order.name] = model

    def _say_ready(self, model: Model, sizes: Sequence[Size], begin: float, *, known: bool = False) -> None:
        """Warm ``model`` at ``sizes``, and say that it is ready and what its parts take."""
        points = []
        for width, height in sizes:
            self._say(Running(ids=(), what=f"warm {model.name}", seconds=OPENING))
            forget_peak()
            before, seen = resident()[0], []
            for observation, drawn in warm(model.name, model.pipeline, (width, height), known=known):
                seen.append(observation)
                if drawn is not None:
                    model.previews.learn(*drawn)
            if model.pipeline.backend == "cpu" and not known:
                points.append((width * height, resident()[1] - before))
            self._tell([], seen)
        self._say(
            Ready(
                name=model.name,
                backend=model.pipeline.backend,
                seconds=time.perf_counter() - begin,
                footprint=Footprint(points=tuple(points)),
            )
        )

    def _unload(self, name: str) -> None:
        self._close(name)
        self._say(Closed(name=name))

    def _close(self, name: str) -> None:
        model = self._models.pop(name, None)
        for work in [work for work in self._works.values() if work.model is model]:
            self._fail(work, NotReadyError(f"{name} was unloaded"))
        if model is not None:
            model.pipeline.close()

    # What is said.

    def _tell(self, events: Iterable[tuple[str, Event]], seen: Iterable[Observation]) -> None:
        observations = tuple(seen)
        for observation in observations:
            self._costs.observe(*observation)
        self._say(Happened(events=tuple(events), observations=observations))

    def _fail(self, work: Work, error: ServingError) -> None:
        self._forget(work)
        self._say(Failed(id=work.id, error=error))

    def _forget(self, work: Work) -> None:
        self._works.pop(work.id, None)
        self._batcher.remove(work.id)

    def _known(self, ids: Iterable[str]) -> list[Work]:
        return [self._works[name] for name in ids if name in self._works]

    def _say(self, report: Report) -> None:
        self._connection.send(report)


def _plain(weights: Any) -> list[tuple[Path, float]]:
    return [(lora.path, lora.scale) for lora in weights]


def _check_fits(order: Open) -> None:
    """Raises OutOfMemoryError where a model takes more memory than is free, before it does."""
    bundle = Bundle.open(order.bundle, weights=False)
    backend = choose_backend(order.backend, bundle.path, order.device)
    needed, free = model_bytes(bundle, backend, low_memory=order.low_memory), free_of_device(backend, order.device)
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{order.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; unload another model, or "
            "open it with low_memory"
        )


def main(arguments: Sequence[str]) -> None:
    """Serve over the socket of that number until it is closed."""
    # Who serves decides when it ends, also where a whole group of processes is told to.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in QUOTING:
        logging.getLogger(name).setLevel(logging.ERROR)
    descriptor = int(arguments[0])
    os.set_inheritable(descriptor, False)
    with (
        contextlib.suppress(BrokenPipeError, ConnectionResetError),  # nobody is there any more
        Connection(descriptor) as connection,
    ):
        Worker(connection).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
