"""A worker as the dispatcher sees it: what it has open, what it is to do, and what is known of its times and memory."""

from __future__ import annotations

from collections import Counter

from calotype.serving.workers.costs import Costs
from calotype.serving.workers.memory import Footprint
from calotype.serving.workers.messages import Memory, Observation, Order, Ready
from calotype.serving.workers.supervisor import Link, Supervisor
from calotype.serving.workers.tickets import QueuedTicket

HOPELESS = 3  # deaths in a row, after which nobody waits for a worker to come back


class Place:
    """A worker, as it is seen from here."""

    def __init__(self, number: int, supervisor: Supervisor, device: int | None, threads: int | None) -> None:
        self.number, self.supervisor, self.device, self.threads = number, supervisor, device, threads
        self.link: Link | None = None
        self.ready: dict[str, Ready] = {}
        self.tickets: dict[str, QueuedTicket] = {}
        self.costs = Costs()
        self.memory = Memory(resident=0, peak=0)
        self.known: dict[str, list[Observation]] = {}  # what was measured until a model was ready first
        self.measured: set[str] = set()
        self.footprints: dict[str, Footprint] = {}
        self.runs: Counter[int] = Counter()  # of the denoising network, by their rows

    def send(self, order: Order) -> None:
        """Tell the process that runs, if there is one."""
        if self.link is not None:
            self.link.send(order)

    @property
    def hopeless(self) -> bool:
        """Whether it dies again and again."""
        return not self.ready and self.supervisor.in_a_row >= HOPELESS

    def left(self, ticket: QueuedTicket) -> float:
        """Seconds of work until a ticket is finished, were it alone."""
        whole = self.costs.alone(ticket.outline)
        return whole * (1 - ticket.step / ticket.steps) if ticket.steps else whole

    @property
    def seconds(self) -> float:
        """Of work before it, were each task drawn alone."""
        return sum(map(self.left, self.tickets.values()))
