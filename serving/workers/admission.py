"""Whether a task is accepted: by how many there are, by the time and the memory that it would take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from calotype.serving.errors import DeadlineError, OutOfMemoryError, QueueFullError
from calotype.serving.workers.memory import available
from calotype.serving.workers.places import Place
from calotype.serving.workers.supervisor import HANG_SECONDS
from calotype.serving.workers.tickets import QueuedTicket

SMALL = 64 << 20  # bytes: of what takes less, nobody asks what is left


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


def check_memory(places: Sequence[Place], model: str, pixels: int) -> None:
    """Refuse a picture that takes more memory than the machine has left; one that is as large as before passes.

    Raises:
        OutOfMemoryError: it does not fit.
    """
    needed = max((place.footprints[model].bytes_of(pixels) for place in places if model in place.footprints), default=0)
    left = available() if needed >= SMALL else None
    if left is not None and needed > left:
        raise OutOfMemoryError(
            f"the picture would take about {needed / 2**30:.1f} GiB of memory, and {left / 2**30:.1f} are left; "
            "ask for a smaller one"
        )


def check_room(places: Sequence[Place], bounds: Bounds, waiting: int, tickets: Sequence[QueuedTicket]) -> None:
    """Refuse what would be too many, would wait for too long, or be late.

    Args:
        places: the workers.
        bounds: how much is accepted.
        waiting: tasks that are accepted and not finished.
        tickets: what is to be accepted, all or none.

    Raises:
        QueueFullError: with when to come back.
        DeadlineError: a deadline cannot be met.
    """
    room = bounds.max_running + bounds.max_queue - waiting
    if len(tickets) > room:
        raise QueueFullError(
            f"{waiting} pictures are waiting or drawn, and {max(room, 0)} more may be; come back later",
            retry_after=_retry_after(places, waiting),
        )
    ahead, now = seconds_before(places), time.monotonic()
    for ticket in tickets:
        alone = min(
            (place.costs.alone(ticket.outline) for place in places if place.costs.knows(ticket.task.model)), default=0.0
        )
        deadline = ticket.task.deadline
        if deadline is not None and now + alone > deadline:
            raise DeadlineError(
                f"the picture takes {alone:.1f} s alone, and its deadline is in {max(deadline - now, 0.0):.1f} s"
            )
        ahead += alone
    if waiting and ahead > bounds.max_seconds:
        raise QueueFullError(
            f"{seconds_before(places):.0f} s of work are waiting, and with this it would be more than "
            f"{bounds.max_seconds:.0f}; come back later",
            retry_after=_retry_after(places, waiting),
        )


def seconds_before(places: Sequence[Place]) -> float:
    """Of work before the least busy worker, as predicted."""
    able = [place for place in places if place.ready] or places
    return min(place.seconds for place in able)


def _retry_after(places: Sequence[Place], waiting: int) -> float:
    """Seconds in which a task will have left, as predicted."""
    return max(1.0, seconds_before(places) / max(1, waiting))
