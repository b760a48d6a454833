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
    DeadlineError,
    NotReadyError,
    RequestRefusedError,
    ServingError,
    WorkerDiedError,
)
from calotype.serving.service import Load, ModelState
from calotype.serving.tasks import Task
from calotype.serving.wording import said
from calotype.serving.workers.admission import Bounds, check_memory, check_room, seconds_before
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
)
from calotype.serving.workers.outlines import outline_of
from calotype.serving.workers.places import Place
from calotype.serving.workers.roster import Roster
from calotype.serving.workers.served import Served
from calotype.serving.workers.supervisor import COMMAND, Down, News, Supervisor, Up
from calotype.serving.workers.tickets import QueuedTicket

MOST_DEATHS = 2  # of workers with one task in them
CHECK_SECONDS = 0.5  # between two looks for workers that hang
logger = logging.getLogger(__name__)


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
        self._roster = Roster(models, self._places)

    # What the HTTP side sees; see Service.

    @property
    def models(self) -> Mapping[str, ModelState]:
        """See :attr:`calotype.serving.service.Service.models`."""
        return {name: self._roster.state(name, stopping=self._stopping) for name in self._roster.models}

    @property
    def stopping(self) -> bool:
        """See :attr:`calotype.serving.service.Service.stopping`."""
        return self._stopping

    @property
    def load(self) -> Load:
        """See :attr:`calotype.serving.service.Service.load`."""
        running = sum(ticket.steps > 0 for ticket in self._tickets.values())
        return Load(waiting=len(self._tickets) - running, running=running, seconds=seconds_before(self._places))

    def submit(self, tasks: Sequence[Task]) -> list[QueuedTicket]:
        """See :meth:`calotype.serving.service.Service.submit`."""
        tickets = [self._admitted(task) for task in tasks]
        check_room(self._places, self.bounds, len(self._tickets), tickets)
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
            "workers": [place.to_json() for place in self._places],
        }

    # How it is operated.

    def start(self) -> None:
        """Start the workers, which open all models; returns at once."""
        for place in self._places:
            place.supervisor.start()
        self._check()

    async def opened(self) -> None:
        """Wait until every model is open at every worker, or cannot be opened."""
        while not self._roster.settled():
            await self._change()

    def failure(self, name: str) -> str:
        """Why no worker could open a model; "" where one has, or tries."""
        return self._roster.failure(name)

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
        """Open one more model at every worker, or one that was unloaded or could not be opened; returns at once.

        What waits for one that is open already is drawn by the new one.
        """
        for place in self._places:
            for ticket in [own for own in place.tickets.values() if own.task.model == model.name]:
                place.send(Cancel(id=ticket.task.id))
                self._hold(place, ticket)
        self._roster.open(model)

    def open_named(self, name: str) -> None:
        """See :meth:`calotype.serving.service.Operated.open_named`."""
        self.open(self._roster.named(name))

    def unload(self, name: str) -> None:
        """Close a model everywhere; its tasks fail. Raises UnknownModelError where there is none."""
        self._roster.model(name)
        for ticket in [ticket for ticket in self._tickets.values() if ticket.task.model == name]:
            self._end(ticket, NotReadyError(f"{name} was unloaded"))
        self._roster.unload(name)

    def warm(self, name: str, sizes: Sequence[Size]) -> None:
        """Have a model drawn with at ``sizes`` once, at every worker that has it; returns at once.

        Raises:
            UnknownModelError: there is none.
            InputError: it cannot draw at one of them.
        """
        self._roster.warm(name, sizes)

    # Admission.

    def _admitted(self, task: Task) -> QueuedTicket:
        """A ticket, if the request fits its model and somebody can draw it."""
        model = self._roster.model(task.model)
        if self._stopping:
            raise NotReadyError("the server is stopping")
        if task.id in self._tickets:
            raise RequestRefusedError(f"there is a task {task.id!r} already")
        if not self._roster.accepts(task.model):
            raise self._not_ready(task.model)
        try:
            request = model.resolved(task.request)
            outline = outline_of(task.model, model.manifest, request, model.open.fast)
        except InputError as error:
            raise RequestRefusedError(said(error)) from None
        check_memory(self._places, task.model, outline.area * model.manifest.vae.downscale**2)
        task = dataclasses.replace(task, request=request)
        return QueuedTicket(task, outline, self._take_back)

    def _not_ready(self, name: str) -> NotReadyError:
        return NotReadyError(self._roster.why(name), retry_after=self._roster.retry_after(name))

    # Tickets.

    def _hand_over(self, ticket: QueuedTicket) -> None:
        """To the worker with the least to do; where none has the model, it is held until one has.

        One that was in a run when a worker died is given to none that is opening a model: if that dies too, it should
        be known what killed it.
        """
        name = ticket.task.model
        able = [own for own in self._places if name in own.ready and not (ticket.deaths and own.opening)]
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
            if self._roster.awaited(ticket.task.model):
                self._hand_over(ticket)
            else:
                self._end(ticket, self._not_ready(ticket.task.model))

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
            case Happened():
                self._happened(place, news)
            case Failed(id=id, error=error):
                ticket = place.tickets.get(id)
                if ticket is not None:
                    ticket.end(error)
                    self._leave(ticket)
            case Up(link=link):
                self._roster.up(place, link)
            case Down(ids=ids):
                self._down(place, ids)
            case Ready():
                self._roster.ready(place, news)
                self._hand_over_held()
            case OpenFailed():
                self._roster.open_failed(place, news)
                self._hand_over_held()
            case Memory():
                place.memory = news
            case Running() | Closed():
                pass
        self._changed.set()

    def _happened(self, place: Place, news: Happened) -> None:
        for observation in news.observations:
            place.observe(observation)
        for name, event in news.events:
            ticket = place.tickets.get(name)
            if ticket is not None:
                ticket.tell(event)
                if ticket.ended:
                    place.supervisor.praise()
                    self._leave(ticket)

    def _down(self, place: Place, ids: tuple[str, ...]) -> None:
        """Have drawn again what a dead worker had; a task that was in what it did, once."""
        self._roster.down(place)
        for ticket in list(place.tickets.values()):
            self._hold(place, ticket)
            if ticket.task.id in ids:
                ticket.deaths += 1
            if ticket.deaths >= MOST_DEATHS:
                self._end(ticket, WorkerDiedError(f"{MOST_DEATHS} workers died with it; it is not tried again"))
        self._hand_over_held()

    def _check(self) -> None:
        """Look for workers that hang, now and then."""
        for place in self._places:
            place.supervisor.check(busy=bool(place.tickets))
        self._checks = self._loop.call_later(min(CHECK_SECONDS, self.bounds.hang_seconds / 2), self._check)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
