"""A request of HTTP and its pictures: admitted by limits and key, handed to the service, followed, counted.

Every API draws through a :class:`Front`, so that none of them forgets a bound, a figure, or a client that has left.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive, Scope

from calotype.runtime.errors import quoted
from calotype.runtime.request import Request
from calotype.serving.errors import CancelledError, NotReadyError, ServingError, UnknownModelError
from calotype.serving.http.images import Uploads
from calotype.serving.http.kept import Kept
from calotype.serving.http.keys import ANYBODY, Allowance, Key
from calotype.serving.http.limits import Limits
from calotype.serving.http.logs import Record, record_of
from calotype.serving.http.metrics import Metrics, outcome_of
from calotype.serving.http.security import Access
from calotype.serving.service import ModelState, Service, Ticket
from calotype.serving.tasks import Drawn, Event, Stepped, Task

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator decides of the HTTP side.

    Attributes:
        limits: what a request may ask for.
        access: who gets in.
        log_prompts: whether the line of a request has its prompts.
    """

    limits: Limits = dataclasses.field(default_factory=Limits)
    access: Access = dataclasses.field(default_factory=Access)
    log_prompts: bool = False


class Front:
    """What every endpoint works with.

    Attributes:
        service: the queue before the workers.
        settings: may be changed while the server runs: the next request has the new ones.
        metrics: what Prometheus is told.
        uploads: decodes what clients send.
        kept: pictures that have a URL.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings = service, settings
        self.metrics, self.uploads = Metrics(service), Uploads()
        self.kept = Kept(lambda: self.settings.limits)
        self._allowance = Allowance()

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return self.settings.limits

    def model(self, name: str | None) -> ModelState:
        """The model of that name, or the first one.

        Raises:
            UnknownModelError: there is none.
            NotReadyError: there is no model at all, yet.
        """
        models = self.service.models
        if not models:
            raise NotReadyError("no model is open; the operator can load one", retry_after=10)
        found = next(iter(models.values())) if name is None else models.get(name)
        if found is None:
            raise UnknownModelError(f"there is no model {quoted(name)}; valid: {', '.join(models)}")
        return found

    def submit(
        self,
        scope: Scope,
        model: ModelState,
        requests: Sequence[Request],
        *,
        previews: int = 0,
        deadline: float | None = None,
        given: str = "n",
    ) -> list[Drawing]:
        """Hand the pictures of one request of HTTP to the service, all of them or none.

        Args:
            scope: ASGI's, of the request.
            model: that draws them.
            requests: one for each picture.
            previews: how many of each picture are wanted.
            deadline: in seconds from now; None is as the limits say.
            given: the field that says how many pictures there are.

        Raises:
            ServingError: why they are not drawn.
        """
        record, key = record_of(scope), scope.get("calotype_key", ANYBODY)
        self._describe(record, model, requests)
        try:
            until = time.monotonic() + self.limits.seconds(deadline)
            self.limits.check_images(len(requests), given)
            for request in requests:
                self.limits.check(request, model.manifest)
            self._allowance.take(key, len(requests))
        except ServingError:
            self._refused(record, model, len(requests))
            raise
        tasks = [
            Task(
                id=f"{record.id}-{number}",
                model=model.name,
                request=request,
                deadline=until,
                priority=key.priority,
                previews=previews,
                client=key.name,
            )
            for number, request in enumerate(requests)
        ]
        try:
            tickets = self.service.submit(tasks)
        except BaseException:
            self._allowance.give_back(key, len(requests))
            self._refused(record, model, len(requests))
            raise
        return [Drawing(self, ticket, record, key) for ticket in tickets]

    def ended(self, key: Key) -> None:
        """A picture of ``key`` is no longer on its way."""
        self._allowance.give_back(key)

    def _refused(self, record: Record, model: ModelState, pictures: int) -> None:
        record.fields["outcome"] = "rejected"
        self.metrics.rejected(model.name, pictures)

    def _describe(self, record: Record, model: ModelState, requests: Sequence[Request]) -> None:
        record.fields |= {"model": model.name, "pictures": len(requests)}
        if self.settings.log_prompts and requests:
            record.fields |= {"prompt": requests[0].prompt, "negative_prompt": requests[0].negative_prompt}


class Drawing:
    """One picture on its way. It has to be followed or :meth:`drop` ped: until then it counts as its key's."""

    def __init__(self, front: Front, ticket: Ticket, record: Record, key: Key) -> None:
        self.ticket = ticket
        self._front, self._record, self._key = front, record, key
        self._begin, self._open = time.monotonic(), True

    async def events(self) -> AsyncGenerator[Event]:
        """Its events, :class:`Drawn` last; whoever stops listening takes it back.

        Raises:
            ServingError: why there is no picture.
        """
        previewed = False
        try:
            async for event in self.ticket.events():
                if isinstance(event, Stepped) and event.preview is not None and not previewed:
                    previewed = True
                    self._front.metrics.previewed(self.ticket.task.model, time.monotonic() - self._begin)
                elif isinstance(event, Drawn):
                    self._finished(event)
                yield event
        except BaseException as error:
            self._ended(error)
            raise
        finally:
            self.drop()

    async def drawn(self) -> Drawn:
        """Wait for the picture; whoever stops waiting takes it back.

        Raises:
            ServingError: why there is none.
        """
        async for event in self.events():
            if isinstance(event, Drawn):
                return event
        raise CancelledError("the picture was taken back")

    def drop(self) -> None:
        """Take it back, unless it has ended."""
        self._ended(CancelledError("nobody waits for it"))

    def _finished(self, drawn: Drawn) -> None:
        if self._close("finished"):
            steps = int(drawn.request.get("num_inference_steps") or 0)
            self._front.metrics.finished(self.ticket.task.model, drawn.seconds, steps)
            for name, seconds in drawn.seconds.items():
                own = f"{name}_seconds"
                self._record.fields[own] = round(max(self._record.fields.get(own, 0.0), seconds), 6)

    def _ended(self, error: BaseException) -> None:
        if self._close(outcome_of(error)):
            self._front.metrics.ended(self.ticket.task.model, error)
            self.ticket.cancel()

    def _close(self, outcome: str) -> bool:
        """It is no longer on its way: once. Of several, the request's line says what befell one that failed."""
        if not self._open:
            return False
        self._open = False
        self._front.ended(self._key)
        if outcome != "finished" or "outcome" not in self._record.fields:
            self._record.fields["outcome"] = outcome
        return True


async def all_drawn(drawings: Sequence[Drawing]) -> list[Drawn]:
    """All of them in their order; where one fails, or nobody waits any more, the others are taken back.

    Raises:
        ServingError: why one of them is not drawn.
    """
    waiting = [asyncio.ensure_future(drawing.drawn()) for drawing in drawings]
    try:
        return list(await asyncio.gather(*waiting))
    finally:
        for work in waiting:
            work.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for drawing in drawings:
            drawing.drop()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` comes to, which ends at once where the client leaves; its body has to be read before.

    Raises:
        CancelledError: the client has left.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise CancelledError("the client has left")
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
