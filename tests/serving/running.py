"""A dispatcher with real workers over talbot, in an event loop that tests run things in."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from calotype.runtime.request import Request
from calotype.serving.tasks import Task
from calotype.serving.workers.admission import Bounds
from calotype.serving.workers.dispatcher import Dispatcher
from calotype.serving.workers.messages import Open
from calotype.serving.workers.served import Served
from calotype.serving.workers.tickets import QueuedTicket

FAULTY = (sys.executable, str(Path(__file__).parent / "faulty_worker.py"))
TIMEOUT = 120.0  # of what takes a second where nothing else runs
SIZE = 64
T = TypeVar("T")


class Running:
    """The dispatcher, and its loop."""

    def __init__(self, runner: asyncio.Runner, dispatcher: Dispatcher) -> None:
        self._runner, self.dispatcher, self._numbers = runner, dispatcher, 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` to its end."""
        return self._runner.run(asyncio.wait_for(work, 10 * TIMEOUT))

    def task(self, prompt: str = "a red apple", **given: Any) -> Task:
        """A task of few steps; what is no field of a task is one of its request."""
        self._numbers += 1
        own = {name: given.pop(name) for name in ("deadline", "priority", "previews") if name in given}
        return Task(id=f"t{self._numbers}", model=given.pop("model", "talbot"), request=request(prompt, **given), **own)

    async def until(self, condition: Any) -> None:
        """Wait until ``condition()``."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, "it does not come about"
            await asyncio.sleep(0.01)

    async def outcome(self, ticket: QueuedTicket) -> Any:
        """The picture's bytes, or the error."""
        try:
            return (await ticket.drawn()).pixels.tobytes()
        except Exception as error:
            return error


def request(prompt: str = "a red apple", **given: Any) -> Request:
    """One of a small picture in few steps."""
    given = {"seed": 0, "width": SIZE, "height": SIZE, "num_inference_steps": 3, **given}
    return Request(prompt=prompt, **given)


def talbot(name: str = "talbot", **given: Any) -> Served:
    """The bundled model, warmed at the tests' size alone."""
    given = {"bundle": "talbot", "backend": "cpu", "threads": 1, "sizes": ((SIZE, SIZE),), **given}
    return Served.of(Open(name=name, **given))


@contextlib.contextmanager
def running(*models: Served, bounds: Bounds | None = None, wait: bool = True, **given: Any) -> Iterator[Running]:
    """Start workers for ``models``; they are stopped at the end, whatever happens."""
    with asyncio.Runner() as runner:

        async def make() -> Dispatcher:
            dispatcher = Dispatcher(models or [talbot()], bounds, **given)
            dispatcher.start()
            return dispatcher

        found = Running(runner, runner.run(make()))
        try:
            if wait:
                found.run(found.dispatcher.opened())
            yield found
        finally:
            found.run(found.dispatcher.stop())
