"""What a worker does next: a pure object that orders pictures which come and go, and says which share a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from calotype.runtime.denoising.batching import pick
from calotype.runtime.denoising.job import Key
from calotype.serving.workers.costs import DECODE, SWITCH, Costs
from calotype.serving.workers.entry import Entry, Work
from calotype.serving.workers.entry import Ticket as Ticket
from calotype.serving.workers.entry import area_of as area_of
from calotype.serving.workers.entry import network_of as network_of

# Pictures that need other weights than the last run come so many times later than merging them takes.
RELUCTANCE = 4.0
# How many times more a run must give in a second for more jobs to be let in.
GAIN = 1.02
MOST_OPEN = 64  # jobs that hold memory at once


class Engine(Protocol):
    """What the sessions can do; asked of a key only when a job of it comes next, since a worker may open one for it."""

    def capacity(self, model: str, key: Key) -> int:
        """The most rows of one run."""
        ...

    def padded(self, model: str, key: Key, rows: int) -> int:
        """The rows that a run of ``rows`` really has."""
        ...

    def kept(self, model: str, weights: Hashable) -> bool:
        """Whether going to these weights, of an outline, takes no time: their sessions are open."""
        ...


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

    The earliest due comes first: ``due = min(deadline, arrived + PATIENCE * alone / priority)`` where ``alone`` are the
    seconds that the picture takes alone, so that short pictures overtake long ones, and nobody is overtaken for ever.

    The first picture takes others along, in this order, that may share its run, up to the number that gives most in a
    second. While it has slack, that is the most work; where its due time is near, the most pictures (each counts by one
    over the root of its seconds left), so that a short picture is not slowed down for long ones. What is ready to be
    decoded is decoded at once while the first picture has slack, else in its turn. A picture that cannot meet its
    deadline any more, even were it alone, is given up. While something is held, something is done.

    The bound: ``due`` of a picture never changes but by what is learned of costs, so that none which arrives after
    ``due + RELUCTANCE * switch`` ever comes first before it: from then on it waits only for what had arrived by then.

    Args:
        costs: predicts; may be refined meanwhile.
        engine: what the sessions can do.
        most_open: jobs that are prepared at once at most.
    """

    def __init__(self, costs: Costs, engine: Engine, *, most_open: int = MOST_OPEN) -> None:
        self._costs, self._engine, self._most_open = costs, engine, most_open
        self._entries: dict[str, Entry] = {}
        self._weights: dict[str, object] = {}  # by model, those that its last picture was prepared or moved with
        self._serials = itertools.count()

    def add(self, ticket: Ticket) -> None:
        """Accept a picture. An id that is held already is refused with a ValueError."""
        if ticket.id in self._entries:
            raise ValueError(f"{ticket.id} is held already")
        self._entries[ticket.id] = Entry(ticket, next(self._serials))

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
                self._weights[entry.model] = entry.weights
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
        order = self._order()
        late = tuple(entry.id for entry in order if entry.late(now))
        if late:
            for name in late:
                del self._entries[name]
            return Expire(ids=late)
        if not order:
            return None
        open_jobs = sum(entry.job is not None for entry in order)
        head = next(entry for entry in order if entry.job is not None or open_jobs < self._most_open)
        if head.loose(now):
            head = next((entry for entry in order if entry.job is not None and entry.job.done), head)
        if head.job is None:
            return self._prepare([head])
        if head.job.done:
            seconds = self._costs.seconds(head.model, DECODE, head.ticket.outline.area)
            return Finish(model=head.model, ids=(head.id,), seconds=seconds)
        return self._run(head, order, self._most_open - open_jobs, now)

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

    def _order(self) -> list[Entry]:
        """All, the first to serve first, and what is predicted of them up to date."""
        revision = self._costs.revision
        for entry in self._entries.values():
            if entry.revision != revision:
                entry.predict(self._costs)
                entry.revision = revision
        return sorted(self._entries.values(), key=self._rank)

    def _rank(self, entry: Entry) -> tuple[float, int]:
        return entry.due + RELUCTANCE * self._switch(entry), entry.serial

    def _switch(self, entry: Entry) -> float:
        """Seconds until the weights are merged that it needs."""
        last = self._weights.get(entry.model, entry.weights)
        if last == entry.weights or self._engine.kept(entry.model, entry.weights):
            return 0.0
        return self._costs.seconds(entry.model, SWITCH)

    def _prepare(self, entries: Sequence[Entry]) -> Prepare:
        seconds = sum(self._costs.preparing(entry.ticket.outline) for entry in entries)
        ids = tuple(entry.id for entry in entries)
        return Prepare(model=entries[0].model, ids=ids, seconds=seconds + self._switch(entries[0]))

    def _run(self, head: Entry, order: Sequence[Entry], may_open: int, now: float) -> Action:
        """The run of ``head`` and of those that it takes along; first those of them are prepared that are not yet."""
        candidates = list(_candidates(head, order, may_open))
        chosen, seconds = self._shared(candidates, by_work=not head.tight(now))
        unprepared = [entry for entry in chosen if entry.job is None]
        if unprepared:
            return self._prepare(unprepared)
        jobs = {entry.job: entry.id for entry in chosen if entry.job is not None}
        picked = pick(list(jobs), lambda key: self._engine.capacity(head.model, key))
        ids = tuple(jobs[job] for job in picked)
        return Run(model=head.model, ids=ids, seconds=seconds + self._switch(head))

    def _shared(self, candidates: Sequence[Entry], *, by_work: bool) -> tuple[list[Entry], float]:
        """The first so many of ``candidates`` whose run gives most in a second, and its seconds."""
        head = candidates[0]
        assert head.job is not None
        model, key = head.model, head.job.key
        network, area, capacity = network_of(key), area_of(key), self._engine.capacity(model, key)
        taken: list[Entry] = []
        best, best_rate, best_seconds, rows, gives = 0, 0.0, 0.0, 0, 0.0
        for entry in candidates:
            if taken and rows + entry.rows > capacity:
                continue
            taken.append(entry)
            rows += entry.rows
            alone = self._costs.seconds(model, network, area, self._engine.padded(model, key, entry.rows))
            seconds = self._costs.seconds(model, network, area, self._engine.padded(model, key, rows))
            gives += alone if by_work or entry.left <= 0 else alone / math.sqrt(entry.left)
            rate = gives / seconds if seconds > 0 else 0.0
            if not best or rate > best_rate * GAIN:
                best, best_rate, best_seconds = len(taken), rate, seconds
            if rows >= capacity:
                break
        return taken[:best], best_seconds


def _candidates(head: Entry, order: Sequence[Entry], may_open: int) -> Iterator[Entry]:
    """Those that may share the run of ``head``, which comes first; so many of them may be such as have no job yet."""
    assert head.job is not None
    key = head.job.key
    yield head
    for entry in order:
        if entry.job is None:
            if may_open > 0 and entry.alike(head):
                may_open -= 1
                yield entry
        elif entry is not head and entry.model == head.model and not entry.job.done and entry.job.key == key:
            yield entry
