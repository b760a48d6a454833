"""The stages of a worker's pictures: encoded, denoised in runs that they share, decoded; or failed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from calotype.runtime.pipeline import Pipeline
from calotype.serving.errors import DeadlineError, ServingError
from calotype.serving.tasks import Event, Started, Stepped
from calotype.serving.workers.batcher import Action, Batcher, Expire, Finish, Prepare, Run, area_of, network_of
from calotype.serving.workers.costs import DECODE, ENCODE, SWITCH, TEXT
from calotype.serving.workers.messages import Observation
from calotype.serving.workers.previews import denoised
from calotype.serving.workers.reporter import Reporter
from calotype.serving.workers.works import Model, Work, drawn_of, failure_of, is_memory, spread

FILTERING = 1.0  # seconds that an output filter is predicted to take
LOST = "context is lost"  # of a GPU: nothing works in this process any more
T = TypeVar("T")


class Stages:
    """Does what the batcher says, with the tasks that are on their way.

    Args:
        batcher: is told what came of it.
        reporter: so is the process that serves.

    Attributes:
        works: the tasks, by id.
    """

    def __init__(self, batcher: Batcher, reporter: Reporter) -> None:
        self._batcher, self._reporter = batcher, reporter
        self.works: dict[str, Work] = {}

    @property
    def alone(self) -> bool:
        """Whether a task is here that may have killed a worker, and is to be with nothing else."""
        return any(work.order.alone for work in self.works.values())

    def do(self, action: Action | None) -> None:
        """One action."""
        match action:
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
                    self.fail(work, DeadlineError("its deadline has passed before it was drawn"))
            case None:
                pass

    def of(self, model: Model) -> list[Work]:
        """Those that an open model draws."""
        return [work for work in self.works.values() if work.model is model]

    def fail(self, work: Work, error: ServingError) -> None:
        """The end of a task without a picture."""
        self.forget(work.id)
        self._reporter.failed(work.id, error)

    def forget(self, name: str) -> None:
        """Nobody waits for a task any more."""
        self.works.pop(name, None)
        self._batcher.remove(name)

    def _prepare(self, work: Work, seconds: float) -> None:
        self._reporter.running("encode", seconds, [work.id])
        task, pipeline = work.order.task, work.model.pipeline
        work.begun = begin = time.monotonic()
        known = set(pipeline.networks.sessions)
        job = self._tried(work, lambda: pipeline.prepare(task.request))
        if job is None:
            return
        work.job, work.model.used, work.encoded = job, True, time.monotonic()
        took = work.encoded - begin
        work.due = frozenset() if work.model.hidden else spread(task.previews, job.steps)
        name = work.model.name
        switched = any(key.weights for key in pipeline.networks.sessions if key not in known)
        seen = [Observation(name, SWITCH if switched else TEXT, 0, 1, took - job.picture_seconds)]
        if task.request.image is not None:
            seen.append(Observation(name, ENCODE, work.order.outline.area, 1, job.picture_seconds))
        self._batcher.prepared({work.id: job})
        self._reporter.tell([], seen)

    def _run(self, works: Sequence[Work], seconds: float) -> None:
        """One run of the denoising network; where it fails, each of ``works`` is tried alone."""
        jobs = {work.job: work for work in works if work.job is not None and not work.job.done}
        if not jobs:
            return
        ids, pipeline = tuple(work.id for work in jobs.values()), works[0].model.pipeline
        first = [(work.id, Started(steps=job.steps)) for job, work in jobs.items() if not work.first_run]
        if first:
            self._reporter.tell(first, [])
        self._reporter.running("denoise", seconds, ids)
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
                _recover(pipeline, error)
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
        seen = Observation(works[0].model.name, network_of(key), area_of(key), rows, end - begin)
        self._reporter.tell(events, [seen])

    def _finish(self, works: Sequence[Work], seconds: float) -> None:
        if not works:
            return
        self._reporter.running("decode", seconds, [work.id for work in works])
        for work in works:
            job, begin = work.job, time.monotonic()
            assert job is not None
            picture = self._tried(work, functools.partial(work.model.pipeline.finish, job))
            if picture is None:
                continue
            took = time.monotonic() - begin
            if work.model.filter is not None:
                self._reporter.running("filter", FILTERING, [work.id])
            drawn = self._tried(work, functools.partial(drawn_of, work, picture, took))
            if drawn is None:
                continue
            if not work.model.hidden:
                work.model.previews.learn(job.latents, drawn.pixels)
            self.forget(work.id)
            seen = Observation(work.model.name, DECODE, work.order.outline.area, 1, took)
            self._reporter.tell([(work.id, drawn)], [seen])

    def _tried(self, work: Work, action: Callable[[], T]) -> T | None:
        """What ``action`` gives; an exception is the end of ``work`` alone, and None."""
        try:
            return action()
        except Exception as error:
            _recover(work.model.pipeline, error)
            self.fail(work, failure_of(error))
            return None

    def _known(self, ids: Iterable[str]) -> list[Work]:
        return [self.works[name] for name in ids if name in self.works]


def _recover(pipeline: Pipeline, error: Exception) -> None:
    """Leave nothing of a failure behind that the next picture would feel."""
    if LOST in str(error):
        raise error
    if is_memory(error):
        pipeline.trim()
