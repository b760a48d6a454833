"""The denoising loop: rows of many jobs go through a network together, and each job moves on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from calotype.runtime.bundle.form import INT8
from calotype.runtime.bundle.manifest import CONTROLLED, PROMPTED
from calotype.runtime.denoising.batching import pick
from calotype.runtime.denoising.buffers import Pool, Run
from calotype.runtime.denoising.controls import add_controls
from calotype.runtime.denoising.feature_cache import DEEP, SHALLOW
from calotype.runtime.denoising.job import Job, Key, SessionKey
from calotype.runtime.errors import InputError
from calotype.runtime.sessions.session import Session, Sizes


class Denoiser:
    """Moves jobs through the networks that they need; after the first run of a size, nothing is allocated.

    Args:
        sessions: opens or finds the session that a key names.
    """

    def __init__(self, sessions: Callable[[SessionKey], Session]) -> None:
        self._pool = Pool(sessions)

    def capacity(self, key: Key) -> int:
        """The most rows of one run of jobs of that key. In int8 the values of a run may share one scale: 1, so that a
        picture has a run of its own.
        """
        session, buffers = self._pool.of(key)
        if key.session.form == INT8 and not session.keeps_bytes:
            return 1
        own = session.capacity(buffers.symbols(session, key.layout))
        return min([own, *map(self.capacity, key.controls)])

    def padded(self, key: Key, rows: int) -> int:
        """The rows that a run of ``rows`` of that key really has; see :meth:`Session.padded`."""
        return self._pool.of(key)[0].padded(rows)

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
            capacity = self.capacity(key)
            counts = {*_runs(map(max, rows), capacity), *_runs(map(min, rows), capacity)}
            for used in (key, *key.controls):
                session, buffers = self._pool.of(used)
                for padded in sorted({session.padded(count) for count in counts}, reverse=True):
                    buffers.run(session, used.layout, padded)

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
        session, buffers = self._pool.of(key)
        rows = sum(job.rows for job in jobs)
        run = buffers.run(session, key.layout, session.padded(rows))
        _fill(session, run, jobs)
        sizes, network = run.sizes, key.session.network
        if network in (CONTROLLED, PROMPTED):
            add_controls(self._pool, session, run, jobs)
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


def _fill(session: Session, run: Run, jobs: Sequence[Job]) -> None:
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


def _urgency(job: Job) -> tuple[int, int]:
    return -job.evaluations_left, -job.rows


def _keys_to_come(job: Job) -> list[Key]:
    """The keys of a job's runs to come: with a cache, of both networks."""
    if job.done:
        return []
    if job.cache is None:
        return job.keys_to_come
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
