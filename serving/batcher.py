"""What a worker does next: a pure object that orders pictures which come and go, and says which share a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from calotype.runtime.denoising.batching import pick
from calotype.runtime.denoising.job import Key
from calotype.serving.costs import DECODE, SWITCH, Costs, Outline

# How many times its own work a picture may be overtaken for, before it comes first.
PATIENCE = 4.0
# How much more work a second of a run must do for another job to be let in.
GAIN = 1.03
MOST_OPEN = 64  # jobs that hold memory at once


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


class Engine(Protocol):
    """What the sessions can do; asked of a key only when a job of it comes next, since a worker may open one for it."""

    def capacity(self, model: str, key: Key) -> int:
        """The most rows of one run."""
        ...

    def padded(self, model: str, key: Key, rows: int) -> int:
        """The rows that a run of ``rows`` really has."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ticket:
    """A picture that is waited for.

    Attributes:
        id: names it.
        outline: what it will take.
        arrived: when it was accepted, on the clock of ``now``.
        deadline: when nobody waits for it any more; None is never.
        priority: 2.0 waits half as long as 1.0.
    """

    id: str
    outline: Outline
    arrived: float
    deadline: float | None = None
    priority: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Encode the prompts of these, and make their jobs; then :meth:`Batcher.prepared`."""

    model: str
    ids: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Make one run of the denoising network, of all of these jobs in this order; then :meth:`Batcher.moved`."""

    model: str
    ids: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finish:
    """Decode these; then :meth:`Batcher.remove`."""

    model: str
    ids: tuple[str, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expire:
    """Tell those who wait for these that it is too late; they are forgotten here."""

    ids: tuple[str, ...]


Action = Prepare | Run | Finish | Expire


class Batcher:
    """Holds the pictures of one worker, waiting and running. No thread, no clock, no session is in it.

    Order: the least rank first, ``arrived + PATIENCE * left / priority`` or ``deadline - left``, whichever is less;
    ``left`` are the seconds that the picture would take from here alone. So short pictures overtake long ones, one that
    is nearly finished is not overtaken, and a decoding is but the last piece of its picture. The bound: a rank never
    rises, so none that arrives after ``arrived + PATIENCE * (alone + switch) / priority`` is served before it.

    Args:
        costs: predicts; may be refined meanwhile.
        engine: what the sessions can do.
        most_open: jobs that are prepared at once at most.
    """

    def __init__(self, costs: Costs, engine: Engine, *, most_open: int = MOST_OPEN) -> None:
        self._costs, self._engine, self._most_open = costs, engine, most_open
        self._entries: dict[str, _Entry] = {}
        self._weights: dict[str, object] = {}  # by model, those of its last run
        self._serials = itertools.count()

    def add(self, ticket: Ticket) -> None:
        """Accept a picture. An id that is held already is refused with a ValueError."""
        if ticket.id in self._entries:
            raise ValueError(f"{ticket.id} is held already")
        self._entries[ticket.id] = _Entry(ticket, next(self._serials))

    def remove(self, name: str) -> bool:
        """Forget a picture: it is finished, cancelled, or failed. Returns whether it was held."""
        return self._entries.pop(name, None) is not None

    def skip(self, name: str) -> bool:
        """Let a picture end with the step at hand, a new one with its first. Returns whether it is held."""
        entry = self._entries.get(name)
        if entry is None:
            return False
        entry.skipped = True
        if entry.job is not None:
            entry.job.end_early()
            entry.revision = -1
        return True

    def prepared(self, jobs: Mapping[str, Work]) -> None:
        """Take the jobs that were made; those of pictures that are not held any more are passed over."""
        for name, job in jobs.items():
            entry = self._entries.get(name)
            if entry is not None:
                entry.job, entry.revision = job, -1
                if entry.skipped:
                    job.end_early()

    def moved(self, ids: Iterable[str]) -> None:
        """A run has moved these."""
        for name in ids:
            entry = self._entries.get(name)
            if entry is not None:
                entry.revision, entry.started = -1, True
                self._weights[entry.model] = entry.weights

    def next(self, now: float) -> Action | None:
        """What to do now; None where nothing is held."""
        late = tuple(name for name, entry in self._entries.items() if entry.late(now))
        if late:
            for name in late:
                del self._entries[name]
            return Expire(ids=late)
        order = self._order()
        if not order:
            return None
        open_jobs = sum(entry.job is not None for entry in order)
        head = next(entry for entry in order if entry.job is not None or open_jobs < self._most_open)
        if head.job is None:
            return self._prepare([head])
        if head.job.done:
            seconds = self._costs.seconds(head.model, DECODE, head.ticket.outline.area)
            return Finish(model=head.model, ids=(head.id,), seconds=seconds)
        return self._run(head, head.job, order, self._most_open - open_jobs)

    @property
    def ids(self) -> Collection[str]:
        """Those that are held."""
        return self._entries.keys()

    @property
    def running(self) -> int:
        """How many some run has taken."""
        return sum(entry.started for entry in self._entries.values())

    @property
    def seconds(self) -> float:
        """Of work, were each picture drawn alone."""
        return sum(entry.left for entry in self._order())

    def _order(self) -> list[_Entry]:
        revision = self._costs.revision
        for entry in self._entries.values():
            if entry.revision != revision:
                entry.predict(self._costs)
                entry.revision = revision
        return sorted(self._entries.values(), key=lambda entry: (self._rank(entry), entry.serial))

    def _rank(self, entry: _Entry) -> float:
        return entry.rank + (entry.patience * self._switch(entry))

    def _switch(self, entry: _Entry) -> float:
        """Seconds until the weights are merged that it needs."""
        if self._weights.get(entry.model, entry.weights) == entry.weights:
            return 0.0
        return self._costs.seconds(entry.model, SWITCH)

    def _prepare(self, entries: Sequence[_Entry]) -> Prepare:
        seconds = sum(self._costs.preparing(entry.ticket.outline) for entry in entries)
        ids = tuple(entry.id for entry in entries)
        return Prepare(model=entries[0].model, ids=ids, seconds=seconds + self._switch(entries[0]))

    def _run(self, head: _Entry, job: Work, order: Sequence[_Entry], may_open: int) -> Action:
        """The run of ``head`` and of those that it gains by; first those of them are prepared that are not yet."""
        key = job.key
        chosen, seconds = self._shared(head, key, list(self._candidates(head, key, order, may_open)))
        unprepared = [entry for entry in chosen if entry.job is None]
        if unprepared:
            return self._prepare(unprepared)
        jobs = {entry.job: entry.id for entry in chosen if entry.job is not None}
        picked = pick(list(jobs), lambda key: self._engine.capacity(head.model, key))
        ids = tuple(jobs[found] for found in picked)
        return Run(model=head.model, ids=ids, seconds=seconds + self._switch(head))

    def _candidates(self, head: _Entry, key: Key, order: Sequence[_Entry], may_open: int) -> Iterator[_Entry]:
        """Those that may share the run, ``head`` first."""
        yield head
        for entry in order:
            if entry is head:
                continue
            if entry.job is None:
                if may_open > 0 and entry.alike(head):
                    may_open -= 1
                    yield entry
            elif entry.model == head.model and not entry.job.done and entry.job.key == key:
                yield entry

    def _shared(self, head: _Entry, key: Key, candidates: Sequence[_Entry]) -> tuple[list[_Entry], float]:
        """The first so many of ``candidates`` that do the most work a second, and the seconds of their run."""
        model, network, area = head.model, network_of(key), area_of(key)
        capacity = self._engine.capacity(model, key)
        taken: list[_Entry] = []
        best, best_rate, best_seconds, rows, work = 0, 0.0, 0.0, 0, 0.0
        for entry in candidates:
            if taken and rows + entry.rows > capacity:
                continue
            taken.append(entry)
            rows += entry.rows
            work += self._costs.seconds(model, network, area, self._engine.padded(model, key, entry.rows))
            seconds = self._costs.seconds(model, network, area, self._engine.padded(model, key, rows))
            rate = work / seconds if seconds > 0 else 0.0
            if not best or rate > best_rate * GAIN:
                best, best_rate, best_seconds = len(taken), rate, seconds
            if rows >= capacity:
                break
        return taken[:best], best_seconds


class _Entry:
    """A picture that is held, and what is predicted of it."""

    def __init__(self, ticket: Ticket, serial: int) -> None:
        self.ticket, self.serial, self.id = ticket, serial, ticket.id
        self.model, self.weights = ticket.outline.model, ticket.outline.weights
        self.patience = PATIENCE / ticket.priority
        self.job: Work | None = None
        self.started = self.skipped = False
        self.revision = -1  # of the costs that it was predicted with; -1 asks for a new prediction
        self.left = self.rank = 0.0

    @property
    def rows(self) -> int:
        return self.ticket.outline.rows if self.job is None else self.job.rows

    def late(self, now: float) -> bool:
        return self.ticket.deadline is not None and now >= self.ticket.deadline

    def alike(self, other: _Entry) -> bool:
        """Whether its job, were it made, might share a run of ``other``."""
        own, others = self.ticket.outline, other.ticket.outline
        return (own.model, own.area, own.network, own.weights) == (
            others.model,
            others.area,
            others.network,
            others.weights,
        )

    def predict(self, costs: Costs) -> None:
        """Predict the seconds left, and the rank."""
        outline = self.ticket.outline
        if self.job is None:
            self.left = costs.alone(outline)
        else:
            self.left = costs.seconds(self.model, DECODE, outline.area)
            if not self.job.done:
                key = self.job.key
                run = costs.seconds(self.model, network_of(key), area_of(key), self.job.rows)
                self.left += self.job.evaluations_to_come * run
        self.rank = self.ticket.arrived + self.patience * self.left
        if self.ticket.deadline is not None:
            self.rank = min(self.rank, max(self.ticket.arrived, self.ticket.deadline - self.left))


def network_of(key: Key) -> str:
    """The stage of :class:`Costs` under which runs of that key are observed: the network and its form."""
    return f"{key.session.network} {key.session.form}"


def area_of(key: Key) -> int:
    """The area h * w of the latents of jobs of that key."""
    shape = dict(key.layout)["sample"]
    return shape[-2] * shape[-1]
