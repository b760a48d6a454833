"""The queue before all workers: it admits tasks, hands each to the worker with the least to do, and minds their ends.

Everything here happens in the thread of the event loop, which it never holds up: the supervisors' threads hand over
what workers say.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from calotype.runtime.errors import InputError
from calotype.serving.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    NotReadyError,
    OutOfMemoryError,
    QueueFullError,
    RequestRefusedError,
    ServingError,
    UnknownModelError,
    WorkerDiedError,
)
from calotype.serving.service import Load, ModelState
from calotype.serving.tasks import Task
from calotype.serving.wording import said
from calotype.serving.workers.costs import STAGES
from calotype.serving.workers.memory import available
from calotype.serving.workers.messages import (
    Cancel,
    Closed,
    Failed,
    Happened,
    Memory,
    OpenFailed,
    Ready,
    Running,
    Size,
    Skip,
    Submit,
    Unload,
    Warm,
)
from calotype.serving.workers.outlines import outline_of
from calotype.serving.workers.places import Place
from calotype.serving.workers.served import Served
from calotype.serving.workers.supervisor import COMMAND, HANG_SECONDS, Down, Link, News, Supervisor, Up
from calotype.serving.workers.tickets import QueuedTicket

MOST_DEATHS = 2  # of workers with one task in them
SMALL = 64 << 20  # bytes: of what takes less, nobody asks what is left
CHECK_SECONDS = 0.5  # between two looks for workers that hang
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much is accepted, and how long is waited.

    Attributes:
        max_running: tasks that share the workers' runs; those beyond it wait.
        max_queue: tasks that may wait beside them.
        max_seconds: of predicted work that may be before a worker.
        hang_seconds: no silence of a worker that is shorter is a hang.
    """

    max_running: int = 16
    max_queue: int = 64
    max_seconds: float = 600.0
    hang_seconds: float = HANG_SECONDS


class Dispatcher:
    """See :class:`calotype.serving.service.Service`; made, started and used in one event loop.

    Args:
        models: by the name under which each is served, the first is the default.
        bounds: how much is accepted.
        devices: a worker for each: the number of a GPU, or None for what the backend chooses.
        threads: that each worker's CPU backend computes with; None is as many as may be used.
        command: what starts a worker.
    """

    def __init__(
        self,
        models: Iterable[Served],
        bounds: Bounds | None = None,
        *,
        devices: Sequence[int | None] = (None,),
        threads: int | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.bounds = Bounds() if bounds is None else bounds
        self._models = {model.name: model for model in models}
        self._named = dict(self._models)
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, QueuedTicket] = {}
        self._held: dict[str, QueuedTicket] = {}  # that no worker has at the moment
        self._stopping = False
        self._changed = asyncio.Event()
        self._checks: asyncio.TimerHandle | None = None
        self._places = [
            Place(
                number,
                Supervisor(number, self._teller(number), command=command, hang_seconds=self.bounds.hang_seconds),
                device,
                threads,
            )
            for number, device in enumerate(devices)
        ]

    # What the HTTP side sees; see Service.

    @property
    def models(self) -> Mapping[str, ModelState]:
        """See :attr:`calotype.serving.service.Service.models`."""
        return {
            name: ModelState(
                name=name,
                manifest=model.manifest,
                digest=model.digest,
                ready=any(name in place.ready for place in self._places) and not self._stopping,
                why=self._why(name),
                created=model.created,
                loras=tuple(model.loras),
            )
            for name, model in self._models.items()
        }

    @property
    def stopping(self) -> bool:
        """See :attr:`calotype.serving.service.Service.stopping`."""
        return self._stopping

    @property
    def load(self) -> Load:
        """See :attr:`calotype.serving.service.Service.load`."""
        running = sum(ticket.steps > 0 for ticket in self._tickets.values())
        return Load(waiting=len(self._tickets) - running, running=running, seconds=self._seconds())

    def submit(self, tasks: Sequence[Task]) -> list[QueuedTicket]:
        """See :meth:`calotype.serving.service.Service.submit`."""
        tickets = [self._admitted(task) for task in tasks]
        room = self.bounds.max_running + self.bounds.max_queue - len(self._tickets)
        if len(tickets) > room:
            raise QueueFullError(
                f"{len(self._tickets)} pictures are waiting or drawn, and {max(room, 0)} more may be; come back later",
                retry_after=self._retry_after(),
            )
        self._check_time(tickets)
        for ticket in tickets:
            self._tickets[ticket.task.id] = ticket
            if ticket.task.deadline is not None:
                ticket.expiry = self._loop.call_at(ticket.task.deadline, self._expire, ticket)
            self._hand_over(ticket)
        return tickets

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`calotype.serving.service.Service.snapshot`."""
        return {
            "stopping": self._stopping,
            "load": dataclasses.asdict(self.load),
            "workers": [
                {
                    "number": place.number,
                    "device": place.device,
                    "pid": place.supervisor.process_id,
                    "restarts": max(0, place.supervisor.starts - 1),
                    "error": place.supervisor.why,
                    "running": len(place.tickets),
                    "seconds": place.seconds,
                    "memory": dataclasses.asdict(place.memory),
                    "runs": dict(place.runs),
                    "models": {
                        name: {"backend": ready.backend, "opened_in": ready.seconds}
                        for name, ready in place.ready.items()
                    },
                }
                for place in self._places
            ],
        }

    # How it is operated.

    def start(self) -> None:
        """Start the workers, which open all models; returns at once."""
        for place in self._places:
            place.supervisor.start()
        self._check()

    async def opened(self) -> None:
        """Wait until every model is open at every worker, or cannot be opened."""
        while not all(name in place.ready or self._models[name].why for place in self._places for name in self._models):
            if all(place.hopeless for place in self._places):
                return
            await self._change()

    def refuse(self) -> None:
        """Accept nothing more; what is accepted goes on."""
        self._stopping = True
        self._changed.set()

    async def finish(self, seconds: float) -> None:
        """Accept nothing more, and wait until what is accepted is finished, or so many seconds have passed."""
        self.refuse()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._tickets:
                    await self._change()

    async def stop(self, seconds: float = 0.0) -> None:
        """See :meth:`finish`; then end all workers, and with them what is not finished."""
        await self.finish(seconds)
        for ticket in list(self._tickets.values()):
            self._end(ticket, NotReadyError("the server is stopping"))
        if self._checks is not None:
            self._checks.cancel()
        await asyncio.gather(*(asyncio.to_thread(place.supervisor.stop) for place in self._places))
        for place in self._places:
            place.link = None

    def open(self, model: Served) -> None:
        """Open one more model at every worker, or one that was unloaded or could not be opened; returns at once."""
        self._models[model.name] = self._named[model.name] = model
        model.why = ""
        for place in self._places:
            place.ready.pop(model.name, None)
            place.known.pop(model.name, None)
            place.measured.discard(model.name)
            for ticket in [own for own in place.tickets.values() if own.task.model == model.name]:
                place.send(Cancel(id=ticket.task.id))
                self._hold(place, ticket)
            self._open(place, model)

    def open_named(self, name: str) -> None:
        """See :meth:`calotype.serving.service.Operated.open_named`."""
        if name not in self._named:
            valid = ", ".join(self._named) or "none"
            raise UnknownModelError(f"the configuration names no model {name!r}; valid: {valid}")
        model = self._models.get(name)
        if model is not None and not model.why and not all(name in place.ready for place in self._places):
            raise ConflictError(f"{name} is being opened")
        self.open(self._named[name])

    def unload(self, name: str) -> None:
        """Close a model everywhere; its tasks fail. Raises UnknownModelError where there is none."""
        self._model(name)
        del self._models[name]
        for ticket in [ticket for ticket in self._tickets.values() if ticket.task.model == name]:
            self._end(ticket, NotReadyError(f"{name} was unloaded"))
        for place in self._places:
            place.ready.pop(name, None)
            place.send(Unload(name=name))

    def warm(self, name: str, sizes: Sequence[Size]) -> None:
        """Have a model drawn with at ``sizes`` once, at every worker; returns at once."""
        self._model(name)
        for place in self._places:
            if name in place.ready:
                place.send(Warm(name=name, sizes=tuple(sizes)))

    # Admission.

    def _model(self, name: str) -> Served:
        if name not in self._models:
            valid = ", ".join(self._models) or "none"
            raise UnknownModelError(f"there is no model {name!r}; valid: {valid}")
        return self._models[name]

    def _admitted(self, task: Task) -> QueuedTicket:
        """A ticket, if the request fits its model and somebody can draw it."""
        model = self._model(task.model)
        if self._stopping:
            raise NotReadyError("the server is stopping")
        if task.id in self._tickets:
            raise RequestRefusedError(f"there is a task {task.id!r} already")
        if not self._able(task.model):
            raise NotReadyError(self._why(task.model))
        try:
            request = model.resolved(task.request)
            outline = outline_of(task.model, model.manifest, request, model.open.fast)
        except InputError as error:
            raise RequestRefusedError(said(error)) from None
        self._check_memory(task.model, outline.area * model.manifest.vae.downscale**2)
        task = dataclasses.replace(task, request=request)
        return QueuedTicket(task, outline, self._take_back)

    def _check_memory(self, name: str, pixels: int) -> None:
        """Refuse a picture that takes more memory than the machine has left; one that is as large as before passes."""
        needed = max(
            (place.footprints[name].bytes_of(pixels) for place in self._places if name in place.footprints), default=0
        )
        left = available() if needed >= SMALL else None
        if left is not None and needed > left:
            raise OutOfMemoryError(
                f"the picture would take about {needed / 2**30:.1f} GiB of memory, and {left / 2**30:.1f} are left; "
                "ask for a smaller one"
            )

    def _able(self, name: str) -> bool:
        """Whether the model is open, or will be when a worker is back."""
        model = self._models[name]
        awaited = model.was_open and not model.why
        return any(name in place.ready or (awaited and not place.hopeless) for place in self._places)

    def _check_time(self, tickets: Sequence[QueuedTicket]) -> None:
        """Refuse what would wait for too long, or be late."""
        ahead, now = self._seconds(), time.monotonic()
        for ticket in tickets:
            alone = min(
                (place.costs.alone(ticket.outline) for place in self._places if place.costs.knows(ticket.task.model)),
                default=0.0,
            )
            deadline = ticket.task.deadline
            if deadline is not None and now + alone > deadline:
                raise DeadlineError(
                    f"the picture takes {alone:.1f} s alone, and its deadline is in {max(deadline - now, 0.0):.1f} s"
                )
            ahead += alone
        if self._tickets and ahead > self.bounds.max_seconds:
            raise QueueFullError(
                f"{self._seconds():.0f} s of work are waiting, and with this it would be more than "
                f"{self.bounds.max_seconds:.0f}; come back later",
                retry_after=self._retry_after(),
            )

    def _seconds(self) -> float:
        """Of work before the least busy worker, as predicted."""
        places = [place for place in self._places if place.ready] or self._places
        return min(place.seconds for place in places)

    def _retry_after(self) -> float:
        """Seconds in which a task will have left, as predicted."""
        return max(1.0, self._seconds() / max(1, len(self._tickets)))

    # Tickets.

    def _hand_over(self, ticket: QueuedTicket) -> None:
        """To the worker with the least to do; where none has the model, it is held until one has."""
        name = ticket.task.model
        able = [place for place in self._places if name in place.ready]
        if not able:
            self._held[ticket.task.id] = ticket
            return
        place = min(able, key=lambda place: place.seconds)
        if not place.tickets:
            place.supervisor.wake()
        place.tickets[ticket.task.id] = ticket
        ticket.worker = place.number
        accepted = time.monotonic() if ticket.accepted is None else ticket.accepted
        ticket.accepted = accepted
        place.send(Submit(task=ticket.task, outline=ticket.outline, accepted=accepted, alone=ticket.deaths > 0))

    def _hold(self, place: Place, ticket: QueuedTicket) -> None:
        """Take a ticket from its worker, until one can begin it anew."""
        del place.tickets[ticket.task.id]
        ticket.worker, ticket.step, ticket.steps = None, 0, 0
        self._held[ticket.task.id] = ticket

    def _hand_over_held(self) -> None:
        held, self._held = list(self._held.values()), {}
        for ticket in held:
            if self._able(ticket.task.model):
                self._hand_over(ticket)
            else:
                self._end(ticket, NotReadyError(self._why(ticket.task.model)))

    def _take_back(self, ticket: QueuedTicket, skip: bool) -> None:
        """The listener's wish: to have what there is, or nothing."""
        if ticket.ended:
            return
        if not skip:
            self._end(ticket, CancelledError("it was cancelled"))
        elif ticket.worker is not None:
            self._places[ticket.worker].send(Skip(id=ticket.task.id))

    def _expire(self, ticket: QueuedTicket) -> None:
        self._end(ticket, DeadlineError("its deadline has passed before it was drawn"))

    def _end(self, ticket: QueuedTicket, error: ServingError) -> None:
        """End a ticket from here, whatever its worker does."""
        if ticket.worker is not None:
            self._places[ticket.worker].send(Cancel(id=ticket.task.id))
        ticket.end(error)
        self._leave(ticket)

    def _leave(self, ticket: QueuedTicket) -> None:
        """Forget a ticket that has ended."""
        name = ticket.task.id
        self._tickets.pop(name, None)
        self._held.pop(name, None)
        if ticket.worker is not None:
            self._places[ticket.worker].tickets.pop(name, None)
            ticket.worker = None
        self._changed.set()

    # What workers say.

    def _teller(self, number: int) -> Callable[[News], None]:
        def tell(news: News) -> None:
            try:
                self._loop.call_soon_threadsafe(self._take, number, news)
            except RuntimeError:  # the loop is closed, and nobody listens any more
                logger.debug("news of worker %d came after the end", number)

        return tell

    def _take(self, number: int, news: News) -> None:
        place = self._places[number]
        match news:
            case Happened(events=events, observations=observations):
                for observation in observations:
                    place.costs.observe(*observation)
                    if observation.stage not in STAGES and observation.model in place.ready:
                        place.runs[observation.rows] += 1
                    if observation.model not in place.measured:
                        place.known.setdefault(observation.model, []).append(observation)
                for name, event in events:
                    ticket = place.tickets.get(name)
                    if ticket is not None:
                        ticket.tell(event)
                        if ticket.ended:
                            place.supervisor.praise()
                            self._leave(ticket)
            case Failed(id=id, error=error):
                ticket = place.tickets.get(id)
                if ticket is not None:
                    ticket.end(error)
                    self._leave(ticket)
            case Up(link=link):
                self._up(place, link)
            case Down(why=why, ids=ids):
                self._down(place, why, ids)
            case Ready(name=name):
                if name in self._models:
                    place.ready[name] = news
                    if news.footprint.points:
                        place.footprints[name] = news.footprint
                    place.measured.add(name)
                    self._models[name].was_open, self._models[name].why = True, ""
                    self._hand_over_held()
            case OpenFailed(name=name, why=why):
                if name in self._models:
                    self._models[name].why = why
                    self._hand_over_held()
            case Memory():
                place.memory = news
            case Running() | Closed():
                pass
        self._changed.set()

    def _open(self, place: Place, model: Served) -> None:
        threads = model.open.threads or place.threads
        known = tuple(place.known[model.name]) if model.name in place.measured else ()
        place.send(dataclasses.replace(model.open, device=place.device, threads=threads, known=known))

    def _up(self, place: Place, link: Link) -> None:
        place.link = link
        for model in self._models.values():
            self._open(place, model)

    def _down(self, place: Place, why: str, ids: tuple[str, ...]) -> None:
        """Have drawn again what a dead worker had; a task that was in what it did, once."""
        place.link = None
        place.ready.clear()
        for ticket in list(place.tickets.values()):
            self._hold(place, ticket)
            if ticket.task.id in ids:
                ticket.deaths += 1
            if ticket.deaths >= MOST_DEATHS:
                self._end(ticket, WorkerDiedError(f"{MOST_DEATHS} workers died with it; it is not tried again"))
        self._hand_over_held()

    def _why(self, name: str) -> str:
        """What keeps a model from being ready."""
        if self._stopping:
            return "the server is stopping"
        if any(name in place.ready for place in self._places):
            return ""
        if self._models[name].why:
            return self._models[name].why
        for place in self._places:
            if place.supervisor.in_a_row:
                times = place.supervisor.in_a_row
                what = "its worker has died" if times == 1 else f"its worker has died {times} times in a row"
                return f"{what}, and is started again: it {place.supervisor.why}"
        return "it is being opened"

    def _check(self) -> None:
        """Look for workers that hang, now and then."""
        for place in self._places:
            place.supervisor.check(busy=bool(place.tickets))
        self._checks = self._loop.call_later(min(CHECK_SECONDS, self.bounds.hang_seconds / 2), self._check)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
