"""What servers do that do not batch steps, as batchers of a worker: whole requests together, and one at a time.

Both serve in order of arrival. ``benchmarks/serving/servers.py`` has a worker use one of them.
"""

from __future__ import annotations

from calotype.runtime.denoising.batching import pick
from calotype.serving.workers.batcher import Action, Batcher, Expire, Finish, Prepare, Run
from calotype.serving.workers.entry import Entry


class Requests(Batcher):
    """Pictures alike that wait together are drawn together, from their first step to their last; none joins them."""

    most = 64

    def next(self, now: float) -> Action | None:
        """See :meth:`Batcher.next`."""
        self._order()
        late = tuple(entry.id for entry in self._entries.values() if entry.late(now))
        if late:
            for name in late:
                self.remove(name)
            return Expire(ids=late)
        batch = [entry for entry in self._entries.values() if entry.job is not None]
        if not batch:
            batch = self._gathered()
            return self._named(Prepare, batch) if batch else None
        going = [entry for entry in batch if entry.job is not None and not entry.job.done]
        if not going:
            return self._named(Finish, batch[:1])
        jobs = {entry.job: entry for entry in going if entry.job is not None}
        picked = pick(list(jobs), lambda key: self._engine.capacity(going[0].model, key))
        return self._named(Run, [jobs[job] for job in picked])

    def _gathered(self) -> list[Entry]:
        """The first picture, and those behind it of the same size and number of evaluations."""
        waiting = list(self._entries.values())
        head = waiting[:1]
        length = [entry.ticket.outline.evaluations for entry in head]
        alike = [own for own in waiting[1:] if own.alike(head[0]) and own.ticket.outline.evaluations == length[0]]
        return [*head, *alike[: self.most - 1]]

    def _named(self, kind: type[Prepare] | type[Run] | type[Finish], entries: list[Entry]) -> Action:
        """What is done with ``entries``; how long it takes is no matter of these."""
        return kind(model=entries[0].model, ids=tuple(entry.id for entry in entries), seconds=1.0)


class Alone(Requests):
    """One picture at a time."""

    most = 1
