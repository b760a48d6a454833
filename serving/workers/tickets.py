"""Tickets: what the HTTP side holds of a task, and how its events reach who listens."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator, Callable

from calotype.serving.errors import ServingError
from calotype.serving.tasks import Drawn, Event, Started, Stepped, Task
from calotype.serving.workers.costs import Outline


class Mailbox:
    """The events that a listener has not taken yet; of steps only the last one, and the last preview."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._stepped: Stepped | None = None
        self._arrived = asyncio.Event()

    def put(self, event: Started | Stepped) -> None:
        """Add an event; one that is out of date gives way to it."""
        if isinstance(event, Started):
            self._started, self._stepped = event, None  # drawn again from its start, what came before is void
        else:
            kept = self._stepped
            if event.preview is None and kept is not None:
                event = dataclasses.replace(event, preview=kept.preview)
            self._stepped = event
        self.ring()

    def ring(self) -> None:
        """Wake who listens."""
        self._arrived.set()

    async def wait(self) -> None:
        """Wait until something is here, or :meth:`ring`."""
        await self._arrived.wait()
        self._arrived.clear()

    def take(self) -> list[Started | Stepped]:
        """What is here, oldest first."""
        found = [event for event in (self._started, self._stepped) if event is not None]
        self._started = self._stepped = None
        return found


class QueuedTicket:
    """See :class:`calotype.serving.service.Ticket`.

    Attributes:
        task: what was accepted.
        outline: what it takes, as its request tells.
        worker: the number of the worker that has it; None while none has.
        deaths: of workers that were in a run with it.
        step: how many of its steps are done.
        steps: how many it has; 0 until its first run.
        expiry: the timer of its deadline.
        accepted: when it was handed to a worker first (``time.monotonic()``).
    """

    def __init__(self, task: Task, outline: Outline, stop: Callable[[QueuedTicket, bool], None]) -> None:
        self.task, self.outline = task, outline
        self.worker: int | None = None
        self.deaths = self.step = self.steps = 0
        self.expiry: asyncio.TimerHandle | None = None
        self.accepted: float | None = None
        self._stop = stop
        self._result: Drawn | ServingError | None = None
        self._mailboxes: set[Mailbox] = set()

    @property
    def ended(self) -> bool:
        """Whether there is a picture, or never will be."""
        return self._result is not None

    def tell(self, event: Event) -> None:
        """Pass an event on; after the last one nothing is."""
        if self.ended:
            return
        if isinstance(event, Drawn):
            self.end(event)
            return
        self.step = event.step if isinstance(event, Stepped) else 0
        self.steps = event.steps
        for mailbox in self._mailboxes:
            mailbox.put(event)

    def end(self, result: Drawn | ServingError) -> None:
        """The picture, or why there is none; what comes first stays."""
        if self.ended:
            return
        self._result = result
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        for mailbox in self._mailboxes:
            mailbox.ring()

    async def events(self) -> AsyncIterator[Event]:
        """See :meth:`calotype.serving.service.Ticket.events`."""
        mailbox = Mailbox()
        self._mailboxes.add(mailbox)
        if self.steps:
            mailbox.put(Stepped(step=self.step, steps=self.steps) if self.step else Started(steps=self.steps))
        try:
            while self._result is None:
                await mailbox.wait()
                for event in mailbox.take():
                    yield event
        finally:
            self._mailboxes.discard(mailbox)
        yield self._picture()

    async def drawn(self) -> Drawn:
        """See :meth:`calotype.serving.service.Ticket.drawn`."""
        mailbox = Mailbox()
        self._mailboxes.add(mailbox)
        try:
            while self._result is None:
                await mailbox.wait()
        finally:
            self._mailboxes.discard(mailbox)
        return self._picture()

    def cancel(self) -> None:
        """See :meth:`calotype.serving.service.Ticket.cancel`."""
        self._stop(self, False)

    def skip(self) -> None:
        """See :meth:`calotype.serving.service.Ticket.skip`."""
        self._stop(self, True)

    def _picture(self) -> Drawn:
        if isinstance(self._result, ServingError):
            raise copy.copy(self._result)  # each listener's has a trace of its own
        assert self._result is not None
        return self._result
