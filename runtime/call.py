"""A call: the jobs of some requests, moved to their end, and their pictures as they are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from calotype.runtime.denoising.job import Job
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.picture import KINDS, Kind, Picture, StepEnd, Timings
from calotype.runtime.request import Request

if TYPE_CHECKING:
    from calotype.runtime.pipeline import Pipeline
    from calotype.runtime.preparation import Drawing

MOST_JOBS = 64  # of a call that are on their way at once

# Return False to stop the run; what is finished by then is returned.
Callback = Callable[[StepEnd], bool | None]


class Call:
    """Iterating over it draws, and yields each picture with its request's number as soon as it is finished.

    The first job and those that share its runs are moved until they are done, then the others: turn by turn all of them
    would be done at the end. Where one network is in memory at a time, the decoder waits until all are done.

    Args:
        pipeline: what draws.
        requests: the pictures that are asked for; all are checked, and their prompts encoded, before the first step.
        latents: (N, C, height/f, width/f) of unit variance to start from instead of the seeds' noise.
        kind: what pictures are made of; see :class:`Picture`.
        callback: called after every step of every picture; returning False ends the iteration after what is finished.

    Raises:
        InputError: a request asks for what the model cannot do.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        requests: Sequence[Request],
        *,
        latents: Any = None,
        kind: Kind = "pil",
        callback: Callback | None = None,
    ) -> None:
        if not isinstance(kind, str) or kind not in KINDS:
            raise InputError(f"output_type={quoted(kind)} is not known; valid: {', '.join(KINDS)}")
        if callback is not None and not callable(callback):
            raise InputError(f"callback_on_step_end={quoted(callback)} cannot be called; give a function of a StepEnd")
        self._pipeline, self._kind, self._callback = pipeline, kind, callback
        self._begin = time.perf_counter()
        self._prepared = pipeline.encode_all(requests)
        self._latents = pipeline.checked_latents(latents, self._prepared)
        self._encoded = self._end = time.perf_counter()
        self._numbers: dict[Job, int] = {}
        self._runs: list[float] = []
        self._starting = self._decoding = 0.0

    def __iter__(self) -> Iterator[tuple[int, Picture]]:
        waiting = self._started([])
        finished: list[Drawing] = []
        self._pipeline.reserve(waiting)
        while True:
            finished += [job for job in waiting if job.done]
            waiting = self._started([job for job in waiting if not job.done])
            if finished and (not waiting or not self._pipeline.low_memory):
                yield from zip([self._numbers.pop(job) for job in finished], self._decoded(finished), strict=True)
                finished = []
            if not waiting and not finished:
                self._pipeline.trim()
                return
            if not waiting or any(job.done for job in waiting):  # a picture may have no step to take
                continue
            begin = time.perf_counter()
            moved = self._pipeline.advance(waiting)
            self._runs.append(time.perf_counter() - begin)
            if not all(self._told(self._numbers[job], job) for job in waiting if job in moved):
                self._prepared, waiting = [], [job for job in waiting if job.done]

    @property
    def timings(self) -> Timings:
        """Where the time went until the last picture that was yielded."""
        return Timings(
            text_encoder=self._encoded - self._begin,
            vae_encoder=self._starting,
            denoising=sum(self._runs),
            vae_decoder=self._decoding,
            total=self._end - self._begin,
            runs=tuple(self._runs),
        )

    def _started(self, waiting: list[Drawing]) -> list[Drawing]:
        """``waiting`` and the jobs that come next: so many are on their way at once, and so many fit into memory."""
        while self._prepared and len(waiting) < MOST_JOBS:
            number = len(self._latents) - len(self._prepared)
            job = self._pipeline.start(self._prepared.pop(0), self._latents[number])
            self._numbers[job] = number
            self._starting += job.picture_seconds
            waiting.append(job)
        return waiting

    def _decoded(self, jobs: Sequence[Drawing]) -> list[Picture]:
        begin = time.perf_counter()
        pictures = self._pipeline.finish_all(jobs, self._kind)
        self._end = time.perf_counter()
        self._decoding += self._end - begin
        return pictures

    def _told(self, number: int, job: Job) -> bool:
        """Tell the callback of a step; returns whether to go on."""
        if self._callback is None:
            return True
        latents = job.latents.view()
        latents.flags.writeable = False
        end = StepEnd(image=number, step=job.step, steps=job.steps, latents=latents)
        return self._callback(end) is not False
