"""The denoising loop: rows of many jobs go through a network together, and each job moves on its own."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from calotype.runtime.bundle.form import INT8
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.denoising.batching import pick
from calotype.runtime.denoising.feature_cache import DEEP, SHALLOW
from calotype.runtime.denoising.job import Job, Key, Layout, SessionKey
from calotype.runtime.errors import InputError
from calotype.runtime.sessions.session import Session, Sizes


class Denoiser:
    """Moves jobs through the networks that they need; after the first run of a size, nothing is allocated.

    Args:
        sessions: opens or finds the session that a key names.
    """

    def __init__(self, sessions: Callable[[SessionKey], Session]) -> None:
        self._sessions = sessions
        self._buffers: dict[SessionKey, _Buffers] = {}

    def capacity(self, key: Key) -> int:
        """The most rows of one run of jobs of that key. In int8 the values of a run may share one scale: 1, so that a
        picture has a run of its own.
        """
        session = self._sessions(key.session)
        if key.session.form == INT8 and not session.keeps_bytes:
            return 1
        return session.capacity(self._buffers_of(key, session).symbols(session, key.layout))

    def padded(self, key: Key, rows: int) -> int:
        """The rows that a run of ``rows`` of that key really has; see :meth:`Session.padded`."""
        return self._sessions(key.session).padded(rows)

    def pick(self, jobs: Sequence[Job]) -> list[Job]:
        """The first of ``jobs``, none of them done, and those that may share its next run."""
        return pick(jobs, self.capacity)

    def reserve(self, jobs: Sequence[Job]) -> None:
        """Allocate for the runs of ``jobs`` to come, the largest of each session first, so that none of them has to."""
        alike: dict[Key, list[frozenset[int]]] = {}
        for job in jobs:
            for key in _keys_to_come(job):
                alike.setdefault(key, []).append(job.rows_to_come)
        for key, rows in alike.items():
            session, capacity = self._sessions(key.session), self.capacity(key)
            counts = {*_runs(map(max, rows), capacity), *_runs(map(min, rows), capacity)}
            for padded in sorted({session.padded(count) for count in counts}, reverse=True):
                self._buffers_of(key, session).run(session, key.layout, padded)

    def step(self, jobs: Sequence[Job]) -> None:
        """Move each of ``jobs``, like or unlike, by one step, in as few runs as they may share; one that is done stays.

        A step of a solver of second order takes two evaluations, and so two of these runs. An error or an interrupt
        leaves every job either where it was or one evaluation further.
        """
        waiting = {job: None for job in jobs if not job.done}
        while waiting:
            # Those with the most evaluations to go first, then those with the most rows: it takes the fewest runs.
            order = sorted(waiting, key=_urgency) if len(waiting) > 1 else list(waiting)
            for job in self.advance(order):
                del waiting[job]

    def advance(self, jobs: Sequence[Job]) -> set[Job]:
        """Make one run, of the first of ``jobs`` and those that may share it; returns those of which it ended a step.

        None of ``jobs`` is done; their order says who comes first.
        """
        picked = self.pick(jobs)
        steps = [job.step for job in picked]
        self.run(picked)
        return {job for job, step in zip(picked, steps, strict=True) if job.step > step}

    def run(self, jobs: Sequence[Job]) -> None:
        """Evaluate the network once for jobs that share a run, and move each by that evaluation.

        Raises:
            InputError: they may not share one.
        """
        key = jobs[0].key
        for job in jobs:
            if job.key != key:
                raise InputError(f"jobs that need {job.key} and {key} cannot share a run; use those that pick() chose")
        session = self._sessions(key.session)
        rows = sum(job.rows for job in jobs)
        run = self._buffers_of(key, session).run(session, key.layout, session.padded(rows))
        _fill(session, run, jobs)
        sizes, network = run.sizes, key.session.network
        if network == SHALLOW:
            _give_features(session, jobs, sizes)
        session.run(sizes)
        if network == DEEP:
            _keep_features(session, jobs, sizes)
        noise_pred = session.buffer("noise_pred", sizes)  # (rows, C, h, w)
        row = 0
        with np.errstate(over="ignore", invalid="ignore"):  # a picture is looked at once, when it is finished
            for job in jobs:
                taken = job.rows
                job.advance(noise_pred[row : row + taken])
                row += taken

    def _buffers_of(self, key: Key, session: Session) -> _Buffers:
        found = self._buffers.get(key.session)
        if found is None or found.session() is not session:
            self._buffers = {known: own for known, own in self._buffers.items() if own.session() is not None}
            found = self._buffers[key.session] = _Buffers(session)
        return found


@dataclasses.dataclass(kw_only=True)
class _Run:
    """The input buffers of a run of so many rows of one layout: its sizes, and the stamp of what stands in each row."""

    sizes: Sizes
    stamps: list[int]


class _Buffers:
    """What stands in a session's input buffers: a row's inputs are written when they change.

    Rows are known by their stamps, numbers, so that a job that is done is not kept alive; neither is the session.
    """

    def __init__(self, session: Session) -> None:
        self.session, self._generation = weakref.ref(session), session.generation
        self._symbols: dict[object, Sizes] = {}
        self._runs: dict[tuple[object, int], _Run] = {}

    def symbols(self, session: Session, layout: Layout) -> Sizes:
        """The sizes of runs of rows of that layout, without their number."""
        found = self._symbols.get(layout)
        if found is None:
            found = self._symbols[layout] = _symbols(session.inputs, layout)
        return found

    def run(self, session: Session, layout: Layout, rows: int) -> _Run:
        """Have buffers for a run of so many rows."""
        if session.generation != self._generation:
            self._forget(session)
        found = self._runs.get((layout, rows))
        if found is None:
            sizes = {"rows": rows, **self.symbols(session, layout)}
            session.reserve(sizes)
            if session.generation != self._generation:
                self._forget(session)
            found = self._runs[layout, rows] = _Run(sizes=sizes, stamps=[0] * rows)
        return found

    def _forget(self, session: Session) -> None:
        """What was written is lost."""
        self._generation = session.generation
        self._runs.clear()
        self._symbols.clear()


def _fill(session: Session, run: _Run, jobs: Sequence[Job]) -> None:
    """Write a run's inputs; of those that stay the same between evaluations, what does not stand there."""
    sizes, stamps = run.sizes, run.stamps
    sample, timestep = (
        session.buffer("sample", sizes),
        session.buffer("timestep", sizes),
    )  # (rows, C + K, h, w), (rows,)
    row = 0
    for job in jobs:
        first, solver, channels = row, job.solver, len(job.latents)
        for number in range(job.rows):
            stamp, inputs = job.row(number)
            if stamps[row] != stamp:
                stamps[row] = 0  # until all of it is written
                for name, value in inputs.items():
                    session.write(name, sizes, value, row)
                if job.context is not None:
                    sample[row, channels:] = job.context
                stamps[row] = stamp
            row += 1
        solver.scale_model_input(job.latents, job.index, sample[first:row, :channels])
        timestep[first:row] = solver.timesteps[job.index]


def _symbols(inputs: Sequence[TensorSpec], layout: Layout) -> Sizes:
    """The sizes of all symbols but the rows', by the shapes of one row's inputs.

    Raises:
        InputError: an input has another shape than the network takes.
    """
    shapes, symbols = dict(layout), dict[str, int]()
    for spec in inputs:
        shape = shapes.get(spec.name)
        if shape is not None:
            spec.match_row(shape, symbols)
    return symbols


def _urgency(job: Job) -> tuple[int, int]:
    return -job.evaluations_left, -job.rows


def _keys_to_come(job: Job) -> list[Key]:
    """The keys of a job's runs to come: with a cache, of both networks."""
    if job.done:
        return []
    if job.cache is None:
        return [job.key]
    return [job.key._replace(session=job.key.session._replace(network=network)) for network in (DEEP, SHALLOW)]


def _runs(rows: Iterable[int], capacity: int) -> set[int]:
    """The rows of each of the runs that jobs of so many rows share."""
    found, count = set(), 0
    for own in rows:
        if count and count + own > capacity:
            found.add(count)
            count = 0
        count += own
    return {*found, count}


def _give_features(session: Session, jobs: Sequence[Job], sizes: Sizes) -> None:
    feature, row = session.buffer("deep_feature", sizes), 0  # (rows, C, h, w)
    for job in jobs:
        assert job.cache is not None
        job.cache.give(feature[row : row + job.rows])
        row += job.rows


def _keep_features(session: Session, jobs: Sequence[Job], sizes: Sizes) -> None:
    feature, row = session.buffer("deep_feature", sizes), 0  # (rows, C, h, w)
    for job in jobs:
        assert job.cache is not None
        job.cache.keep(feature[row : row + job.rows])
        row += job.rows
