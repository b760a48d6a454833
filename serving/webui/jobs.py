"""What AUTOMATIC1111's clients ask about meanwhile: how far their pictures are, and to end them early.

Its web interface draws one request at a time, and knows of no other. Here each client's requests are its own: it is
told of the oldest, and ends all of them, never what another key asked for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from calotype.serving.errors import CancelledError
from calotype.serving.http.drawing import Drawing
from calotype.serving.tasks import Drawn, Pixels, Started, Stepped


@dataclasses.dataclass
class Progress:
    """How far one picture is."""

    drawing: Drawing
    started: bool = False
    step: int = 0
    steps: int = 0
    preview: Pixels | None = None
    drawn: Drawn | None = None
    early: bool = False
    ended: bool = False

    @property
    def share(self) -> float:
        """0 to 1."""
        return 1.0 if self.ended else self.step / self.steps if self.steps else 0.0

    def end_early(self) -> None:
        """Take what there is after the step at hand; without any, nothing."""
        if not self.ended:
            self.early = True
            self.drawing.ticket.skip() if self.started else self.drawing.ticket.cancel()

    async def follow(self) -> None:
        """Listen until it is drawn, or was ended before it began; raises ServingError."""
        try:
            async for event in self.drawing.events():
                if isinstance(event, Started):
                    self.started, self.step, self.steps = True, 0, event.steps
                elif isinstance(event, Stepped):
                    self.started, self.step, self.steps = True, event.step, event.steps
                    self.preview = self.preview if event.preview is None else event.preview
                else:
                    self.drawn = event
        except CancelledError:
            if not self.early:
                raise
        finally:
            self.ended = True


class Job:
    """The pictures of one request: ``n_iter`` times ``batch_size``, in that order."""

    def __init__(self, client: str, drawings: Sequence[Drawing], batch_size: int) -> None:
        self.client = client
        self.pictures = [Progress(drawing) for drawing in drawings]
        self.batch_size = batch_size
        self.began = time.time()
        self.skipped = self.interrupted = False

    @property
    def iterations(self) -> list[list[Progress]]:
        """The pictures by iteration."""
        size = self.batch_size
        return [self.pictures[start : start + size] for start in range(0, len(self.pictures), size)]

    async def drawn(self) -> list[tuple[int, Drawn]]:
        """All pictures by their number; those that were ended before they began are missing.

        Raises:
            ServingError: why one of them is not drawn; the others are taken back.
        """
        followers = [asyncio.ensure_future(picture.follow()) for picture in self.pictures]
        try:
            await asyncio.gather(*followers)
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.gather(*followers, return_exceptions=True)
        return [(number, own.drawn) for number, own in enumerate(self.pictures) if own.drawn is not None]

    def drop(self) -> None:
        """Take back what has not ended."""
        for picture in self.pictures:
            picture.drawing.drop()

    def skip(self) -> None:
        """End the iteration at hand early."""
        self.skipped = True
        for picture in next((own for own in self.iterations if not all(one.ended for one in own)), []):
            picture.end_early()

    def interrupt(self) -> None:
        """End all of it early."""
        self.interrupted = True
        for picture in self.pictures:
            picture.end_early()

    def state(self, encode: Callable[[Pixels], str] | None) -> dict[str, Any]:
        """The answer to ``progress``; without ``encode``, no preview is in it."""
        iterations = self.iterations
        number = next((i for i, own in enumerate(iterations) if not all(one.ended for one in own)), len(iterations) - 1)
        ahead = [one for one in iterations[number] if not one.ended] or iterations[number]
        preview = next((one.preview for one in reversed(ahead) if one.preview is not None), None)
        # A hundredth from the start, so that nobody divides by nothing.
        progress = max(0.01, sum(one.share for one in self.pictures) / len(self.pictures))
        passed = time.time() - self.began
        return {
            "progress": progress,
            "eta_relative": passed / progress - passed,
            "state": {
                "skipped": self.skipped,
                "interrupted": self.interrupted,
                "stopping_generation": False,
                "job": f"Batch {number + 1} out of {len(iterations)}",
                "job_count": len(iterations),
                "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(self.began)),
                "job_no": number,
                "sampling_step": min(one.step for one in ahead),
                "sampling_steps": max(one.steps for one in ahead),
            },
            "current_image": None if preview is None or encode is None else encode(preview),
            "textinfo": None,
        }


IDLE: dict[str, Any] = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
    "current_image": None,
    "textinfo": None,
}


class Jobs:
    """The requests that are being drawn, and what each client set."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self.models: dict[str, str] = {}  # by client, which model is drawn with where a request says nothing

    def of(self, client: str) -> Iterator[Job]:
        """A client's, the oldest first."""
        return (job for job in list(self._jobs) if job.client == client)

    def add(self, job: Job) -> None:
        """It begins."""
        self._jobs.append(job)

    def remove(self, job: Job) -> None:
        """It is over."""
        self._jobs.remove(job)
