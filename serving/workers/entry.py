"""A picture that the batcher holds: who waits for it, its job, and what is predicted of it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from calotype.runtime.denoising.job import Key
from calotype.serving.workers.costs import DECODE, Costs, Outline

# A picture without a deadline is due so many times later than it would be finished alone.
PATIENCE = 20.0
# A picture has slack while the time until it is due is so many times what it takes.
LOOSE = 3.0
# What is predicted to end so soon after its deadline is given up: predictions may be this much too long.
DOUBT = 0.95


class Work(Protocol):
    """What is asked of a job; :class:`calotype.runtime.denoising.job.Job` is one."""

    @property
    def key(self) -> Key:
        """What another must have in common with it to share its next run."""
        ...

    @property
    def rows(self) -> int:
        """Of its next evaluation."""
        ...

    @property
    def evaluations_to_come(self) -> int:
        """Until it is done."""
        ...

    @property
    def done(self) -> bool:
        """Whether it can be decoded."""
        ...

    def end_early(self) -> None:
        """Let it be done after the step at hand."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ticket:
    """A picture that is waited for.

    Attributes:
        id: names it.
        outline: what it will take.
        arrived: when it was accepted, on the clock of ``now``.
        deadline: when nobody waits for it any more; None is never.
        priority: 2.0 is due in half the time of 1.0; a deadline stands.
    """

    id: str
    outline: Outline
    arrived: float
    deadline: float | None = None
    priority: float = 1.0


class Entry:
    """A picture that is held.

    Attributes:
        job: what moves it; None until it is prepared.
        started: whether a run has taken it.
        skipped: whether it is to end early.
        left: the seconds that it takes from here alone.
        due: when it should be finished.
        revision: of the costs that it was predicted with; -1 asks for a new prediction.
    """

    def __init__(self, ticket: Ticket, serial: int) -> None:
        self.ticket, self.serial, self.id = ticket, serial, ticket.id
        self.model, self.weights = ticket.outline.model, ticket.outline.weights
        self.job: Work | None = None
        self.started = self.skipped = False
        self.revision = -1
        self.left = 0.0
        self.due = ticket.arrived

    @property
    def rows(self) -> int:
        return self.ticket.outline.rows if self.job is None else self.job.rows

    def late(self, now: float) -> bool:
        """Whether its deadline has passed, or can no longer be met."""
        return self.ticket.deadline is not None and now + DOUBT * self.left >= self.ticket.deadline

    def loose(self, now: float) -> bool:
        """Whether others may go first."""
        return self.due - now > LOOSE * self.left

    def tight(self, now: float) -> bool:
        """Whether it is still in time, and will not be for long."""
        return self.left <= self.due - now <= LOOSE * self.left

    def alike(self, other: Entry) -> bool:
        """Whether its job, were it made, might share a run of ``other``."""
        own, others = self.ticket.outline, other.ticket.outline
        return all(getattr(own, name) == getattr(others, name) for name in ("model", "area", "network", "weights"))

    def predict(self, costs: Costs) -> None:
        """Predict the seconds left, and when it is due."""
        outline = self.ticket.outline
        alone = costs.alone(outline)
        if self.job is None:
            self.left = alone
        else:
            self.left = costs.seconds(self.model, DECODE, outline.area)
            if not self.job.done:
                key = self.job.key
                run = costs.seconds(self.model, network_of(key), area_of(key), self.job.rows)
                self.left += self.job.evaluations_to_come * run
        self.due = self.ticket.arrived + PATIENCE * alone / self.ticket.priority
        if self.ticket.deadline is not None:
            self.due = min(self.due, self.ticket.deadline)


def network_of(key: Key) -> str:
    """The stage of :class:`Costs` under which runs of that key are observed: the network, its controls, its form."""
    controls = f"+{len(key.controls)}" if key.controls else ""
    return f"{key.session.network}{controls} {key.session.form}"


def area_of(key: Key) -> int:
    """The area h * w of the latents of jobs of that key."""
    shape = dict(key.layout)["sample"]
    return shape[-2] * shape[-1]
