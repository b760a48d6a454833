"""What the HTTP side sees of the engine: it hands over tasks and listens to their events."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from calotype.runtime.bundle.manifest import Manifest
from calotype.serving.tasks import Drawn, Event, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelState:
    """What is known of a served model.

    Attributes:
        name: under which it is served.
        manifest: the bundle's; the HTTP side fills a request's defaults in with it.
        digest: the first ten digits of the SHA-256 of its denoising network's weights.
        ready: whether a worker has it open and warm.
        why: what keeps it from being ready, one line; "" where nothing does.
        created: when it was opened first, in seconds since 1970.
        loras: the names that requests may use.
        controls: those of ControlNets.
    """

    name: str
    manifest: Manifest
    digest: str
    ready: bool
    why: str = ""
    created: int = 0
    loras: Sequence[str] = ()
    controls: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the server is.

    Attributes:
        waiting: tasks that no run has taken yet.
        running: tasks that some run has taken, and that are not finished.
        seconds: of work, as predicted, until all of them would be finished.
    """

    waiting: int
    running: int
    seconds: float


class Ticket(Protocol):
    """A task that was accepted."""

    @property
    def task(self) -> Task:
        """What was handed over."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """Yield its events as they happen, :class:`Drawn` last; only the last preview is kept for a slow listener.

        Raises:
            ServingError: why there is no picture.
        """
        ...

    async def drawn(self) -> Drawn:
        """Wait for the picture; raises :class:`ServingError` where there is none."""
        ...

    def cancel(self) -> None:
        """Take it back; its work ends within one step, and its listeners get a ``CancelledError`` of this server."""
        ...

    def skip(self) -> None:
        """Let it end early: what there is after the step at hand is decoded."""
        ...


class Service(Protocol):
    """The queue before all workers. Every method returns at once, or waits without holding the event loop up."""

    @property
    def models(self) -> Mapping[str, ModelState]:
        """What is served, by name, in the order of the command line; the first is the default."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether nothing new is accepted."""
        ...

    @property
    def load(self) -> Load:
        """How busy it is."""
        ...

    def submit(self, tasks: Sequence[Task]) -> Sequence[Ticket]:
        """Accept all of ``tasks`` or none; answers at once.

        Raises:
            UnknownModelError: there is no such model.
            NotReadyError: it is not open, or the server is stopping.
            QueueFullError: the queue has no room for them.
            DeadlineError: a deadline cannot be met.
            RequestRefusedError: a request does not fit its model.
        """
        ...

    def snapshot(self) -> dict[str, Any]:
        """The state for health checks and metrics: workers with their restarts, memory and last error; plain values."""
        ...


@runtime_checkable
class Operated(Protocol):
    """What an operator may have done to a service's models.

    Every method returns at once; how far it is and what went wrong, ``models`` and ``snapshot()`` say.
    """

    def open_named(self, name: str) -> None:
        """Open a model that the configuration names, or open it anew.

        Raises:
            UnknownModelError: the configuration names none of that name.
            ConflictError: it is being opened.
            OutOfMemoryError: it does not fit beside the others.
        """
        ...

    def unload(self, name: str) -> None:
        """Close a model; what waits for it fails. Raises UnknownModelError."""
        ...

    def warm(self, name: str, sizes: Sequence[tuple[int, int]]) -> None:
        """Draw each of ``sizes``, width and height in pixels, once. Raises UnknownModelError."""
        ...
