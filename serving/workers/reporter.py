"""What a worker says over its socket, and what it learns itself from what it measures."""

from __future__ import annotations

from collections.abc import Iterable
from multiprocessing.connection import Connection

from calotype.serving.errors import ServingError
from calotype.serving.tasks import Event
from calotype.serving.workers.costs import Costs
from calotype.serving.workers.messages import Failed, Happened, Observation, Report, Running


class Reporter:
    """Says it in the main thread, in order.

    Args:
        connection: to the process that serves.
        costs: learn from every observation.
    """

    def __init__(self, connection: Connection, costs: Costs) -> None:
        self._connection, self.costs = connection, costs

    def say(self, report: Report) -> None:
        """Send one report."""
        self._connection.send(report)

    def running(self, what: str, seconds: float, ids: Iterable[str] = ()) -> None:
        """See :class:`Running`."""
        self.say(Running(ids=tuple(ids), what=what, seconds=seconds))

    def tell(self, events: Iterable[tuple[str, Event]], seen: Iterable[Observation]) -> None:
        """See :class:`Happened`."""
        observations = tuple(seen)
        for observation in observations:
            self.costs.observe(*observation)
        self.say(Happened(events=tuple(events), observations=observations))

    def failed(self, task: str, error: ServingError) -> None:
        """See :class:`Failed`."""
        self.say(Failed(id=task, error=error))
