"""A service without an engine: it draws a smooth small picture of the seed after short steps, and does what it is told.

Tests set its attributes from their own thread while a server in another one uses it; it looks at them as it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import uvicorn

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import InputError
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.parameters import Parameters
from calotype.runtime.request import Request
from calotype.serving.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    NotReadyError,
    QueueFullError,
    RequestRefusedError,
    UnknownModelError,
)
from calotype.serving.service import Load, ModelState
from calotype.serving.tasks import Drawn, Event, Pixels, Started, Stepped, Task

RETRY_AFTER = 7.0


def picture(seed: int, width: int, height: int, share: float = 1.0) -> Pixels:
    """(height, width, 3): a gradient whose colours are the seed's, ``share`` of it bright; without noise."""
    across, down = np.linspace(0, 1, width), np.linspace(0, 1, height)
    colour = np.array([(seed * step) % 200 + 55 for step in (1, 7, 31)])
    light = (across[None, :, None] + down[:, None, None]) / 2 * share
    return (light * colour).astype(np.uint8)


class FakeTicket:
    """A task that was accepted."""

    def __init__(self, service: FakeService, task: Task, request: Request, canvas: Canvas) -> None:
        self._service, self._task, self._request, self._canvas = service, task, request, canvas
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._cancelled = self._skipped = False
        self._work = asyncio.create_task(self._draw())
        self._work.add_done_callback(self._ended)

    @property
    def task(self) -> Task:
        """What was handed over."""
        return self._task

    @property
    def done(self) -> bool:
        """Whether nothing more happens to it."""
        return self._work.done()

    async def events(self) -> AsyncIterator[Event]:
        """Yield events as they happen; of previews that nobody took only the last is there."""
        while True:
            self._changed.clear()
            waiting, self._events = self._events, []
            previews = [id(event) for event in waiting if isinstance(event, Stepped) and event.preview is not None]
            for event in waiting:
                if id(event) not in previews[:-1]:
                    yield event
            if self._work.done() and not self._events:
                self._work.result()
                return
            if not self._events:
                await self._changed.wait()

    async def drawn(self) -> Drawn:
        """Wait for the picture."""
        return await asyncio.shield(self._work)

    def cancel(self) -> None:
        """Take it back."""
        if not self.done and not self._cancelled:
            self._cancelled = True
            self._service.cancelled.append(self._task.id)

    def skip(self) -> None:
        """Let it end early."""
        self._skipped = True

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._changed.set()

    def _ended(self, work: asyncio.Task[Drawn]) -> None:
        if not work.cancelled():
            work.exception()  # nobody may have asked for it, and asyncio complains of those
        self._changed.set()

    def _check(self) -> None:
        """Raise what has happened to it meanwhile."""
        if self._cancelled:
            raise CancelledError("the picture was taken back")
        if self._task.deadline is not None and time.monotonic() > self._task.deadline:
            raise DeadlineError("the picture was not finished by its deadline; ask for fewer steps, or give more time")

    async def _draw(self) -> Drawn:
        """Step by step; of as many previews as were asked for, spread over the steps, the last is before the end."""
        service, begin = self._service, time.monotonic()
        steps = self._request.num_inference_steps
        assert steps is not None
        due = {(number + 1) * steps // (self._task.previews + 1) for number in range(self._task.previews)}
        await service.let_go(self._check)
        queue = time.monotonic() - begin
        service.running.add(self._task.id)
        try:
            self._tell(Started(steps=steps))
            for step in range(1, steps + 1):
                await asyncio.sleep(service.step_seconds)
                await service.let_go(self._check)
                if service.failure is not None and step > service.fails_after:
                    raise service.failure
                own = self._pixels(step / steps)[::4, ::4] if step in due else None
                self._tell(Stepped(step=step, steps=steps, preview=own))
                if self._skipped:
                    break
            drawn = self._drawn(queue, time.monotonic() - begin)
            self._tell(drawn)
            return drawn
        finally:
            service.running.discard(self._task.id)

    def _pixels(self, share: float) -> Pixels:
        seed = self._request.seed
        assert seed is not None
        return picture(seed, self._canvas.width, self._canvas.height, share)

    def _drawn(self, queue: float, total: float) -> Drawn:
        request, canvas = self._request, self._canvas
        assert request.num_inference_steps is not None
        made = Parameters(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            steps=request.num_inference_steps,
            sampler=request.scheduler,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            width=canvas.width,
            height=canvas.height,
            model=self._task.model,
            model_hash=self._service.models[self._task.model].digest,
        )
        known = dataclasses.replace(request, image=None, mask_image=None, strength=None, feather=0)
        sizes = {"height": canvas.height, "width": canvas.width}
        return Drawn(
            pixels=self._pixels(1.0),
            parameters=str(made),
            request={**known.to_json(), **sizes},
            seconds={"queue": queue, "encode": 0.001, "denoise": total - queue, "decode": 0.002, "total": total},
            tokens=len(request.prompt.split()) + 2,
        )


class FakeService:
    """The queue before workers that are not there.

    Attributes:
        step_seconds: what a step takes.
        held: while it is true, nothing begins and no step ends.
        failure: what every picture fails with after ``fails_after`` steps; None is nothing.
        refusal: what every submission is refused with; None is nothing.
        room: how many tasks may be on their way; None is any number.
        submitted: every task that was accepted.
        cancelled: the ids of those that were taken back.
        running: the ids of those that have begun, and are not done.
        asked: what an operator asked for.
    """

    def __init__(self, *models: str, manifest: Manifest | None = None, step_seconds: float = 0.001) -> None:
        self._names = models or ("talbot",)
        self._manifest = Bundle.open("talbot", weights=False).manifest if manifest is None else manifest
        self._usual = step_seconds
        self._tickets: list[FakeTicket] = []
        self.reset()

    def reset(self) -> None:
        """Be as it was made; what is on its way is taken back."""
        for ticket in self._tickets:
            ticket.cancel()
        self._models = {
            name: ModelState(name=name, manifest=self._manifest, digest="0123456789", ready=True, created=1_800_000_000)
            for name in self._names
        }
        self.step_seconds = self._usual
        self.held = self.stopping = False
        self.failure: Exception | None = None
        self.fails_after = 0
        self.refusal: Exception | None = None
        self.room: int | None = None
        self.submitted: list[Task] = []
        self.cancelled: list[str] = []
        self.running: set[str] = set()
        self.asked: list[tuple[str, Any]] = []

    @property
    def models(self) -> Mapping[str, ModelState]:
        """What is served; the first is the default."""
        return self._models

    def change(self, model: str, **fields: Any) -> None:
        """Change what is known of a model, such as ``ready`` and ``why``."""
        self._models[model] = dataclasses.replace(self._models[model], **fields)

    def open_named(self, name: str) -> None:
        """See :class:`calotype.serving.service.Operated`."""
        if name not in self._names:
            raise UnknownModelError(f"there is no model {name!r}; valid: {', '.join(self._names)}")
        if self.held:
            raise ConflictError(f"{name} is being opened")
        self.asked.append(("open", name))

    def unload(self, name: str) -> None:
        """See :class:`calotype.serving.service.Operated`."""
        self.asked.append(("unload", name))

    def warm(self, name: str, sizes: Sequence[tuple[int, int]]) -> None:
        """See :class:`calotype.serving.service.Operated`."""
        self.asked.append(("warm", (name, list(sizes))))

    @property
    def load(self) -> Load:
        """How busy it is."""
        own = [ticket for ticket in self._tickets if not ticket.done]
        return Load(waiting=len(own) - len(self.running), running=len(self.running), seconds=0.1 * len(own))

    def submit(self, tasks: Sequence[Task]) -> list[FakeTicket]:
        """Accept all of ``tasks`` or none."""
        if self.refusal is not None:
            raise self.refusal
        if self.stopping:
            raise NotReadyError("the server is stopping", retry_after=RETRY_AFTER)
        self._tickets = [ticket for ticket in self._tickets if not ticket.done]
        if self.room is not None and len(self._tickets) + len(tasks) > self.room:
            raise QueueFullError("the queue is full", retry_after=RETRY_AFTER)
        checked = [self._checked(task) for task in tasks]
        accepted = [FakeTicket(self, task, *own) for task, own in zip(tasks, checked, strict=True)]
        self._tickets += accepted
        self.submitted += tasks
        return accepted

    def snapshot(self) -> dict[str, Any]:
        """The state of one worker."""
        memory = {"resident": 2**20, "peak": 2**21, "device": None}
        runs = {1: 3, 2: 5}
        own = {"number": 0, "device": None, "pid": 1, "restarts": 2, "memory": memory, "runs": runs, "error": ""}
        return {"workers": [own]}

    async def let_go(self, check: Any) -> None:
        """Wait while pictures are held, and look after each moment whether this one is still wanted."""
        check()
        while self.held:
            await asyncio.sleep(0.002)
            check()

    def _checked(self, task: Task) -> tuple[Request, Canvas]:
        """The request with every default filled in, and its canvas."""
        model = self._models.get(task.model)
        if model is None:
            raise UnknownModelError(f"there is no model {task.model!r}; valid: {', '.join(self._models)}")
        if not model.ready:
            raise NotReadyError(f"the model {task.model!r} is not open: {model.why}", retry_after=RETRY_AFTER)
        if task.deadline is not None and task.deadline <= time.monotonic():
            raise DeadlineError("the deadline cannot be met")
        try:
            request = task.request.resolved(model.manifest)
            return request, Canvas.open(model.manifest, request)
        except InputError as error:
            raise RequestRefusedError(error) from None


@contextlib.contextmanager
def started(app: Any, **options: Any) -> Iterator[uvicorn.Server]:
    """A server of an application on a real socket of this machine, in a thread."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_config=None, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server did not start")
            time.sleep(0.005)
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def address(server: uvicorn.Server) -> str:
    """``http://127.0.0.1:PORT``."""
    (socket,) = server.servers[0].sockets
    return f"http://127.0.0.1:{socket.getsockname()[1]}"


@contextlib.contextmanager
def served(app: Any, **options: Any) -> Iterator[str]:
    """The address of an application that is served; see :func:`started`."""
    with started(app, **options) as server:
        yield address(server)
