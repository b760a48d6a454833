"""A worker as the dispatcher sees it: what it has open, what it is to do, and what is known of its times and memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from calotype.serving.workers.costs import STAGES, Costs
from calotype.serving.workers.memory import Footprint
from calotype.serving.workers.messages import Memory, Observation, Order, Ready
from calotype.serving.workers.supervisor import Link, Supervisor
from calotype.serving.workers.tickets import QueuedTicket

HOPELESS = 3  # deaths in a row, after which nobody waits for a worker to come back


class Place:
    """A worker, as it is seen from here.

    Attributes:
        ready: the models that its process has open and warm, by name.
        opening: the numbers of the orders to open that its process has not answered, by the model's name.
        failed: why its process could not open a model, by its name.
    """

    def __init__(self, number: int, supervisor: Supervisor, device: int | None, threads: int | None) -> None:
        self.number, self.supervisor, self.device, self.threads = number, supervisor, device, threads
        self.link: Link | None = None
        self.ready: dict[str, Ready] = {}
        self.opening: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.tickets: dict[str, QueuedTicket] = {}
        self.costs = Costs()
        self.memory = Memory(resident=0, peak=0)
        self.known: dict[str, list[Observation]] = {}  # what was measured until a model was ready first
        self.measured: set[str] = set()
        self.opened_in: dict[str, float] = {}  # seconds that a model took the last time
        self.footprints: dict[str, Footprint] = {}
        self.runs: Counter[int] = Counter()  # of the denoising network, by their rows

    def send(self, order: Order) -> None:
        """Tell the process that runs, if there is one."""
        if self.link is not None:
            self.link.send(order)

    def observe(self, observation: Observation) -> None:
        """Learn from what the process has measured."""
        self.costs.observe(*observation)
        if observation.stage not in STAGES and observation.model in self.ready:
            self.runs[observation.rows] += 1
        if observation.model not in self.measured:
            self.known.setdefault(observation.model, []).append(observation)

    def forget(self, name: str) -> None:
        """A model is another one from now on, or none: what was measured of it is void."""
        for own in (self.ready, self.opening, self.failed, self.known, self.footprints):
            own.pop(name, None)
        self.measured.discard(name)
        self.costs.forget(name)

    @property
    def hopeless(self) -> bool:
        """Whether it dies again and again."""
        return not self.ready and self.supervisor.in_a_row >= HOPELESS

    def expects(self, name: str) -> bool:
        """Whether a model is being opened, or will be when the process is back."""
        return not self.hopeless and (self.link is None or name in self.opening)

    def left(self, ticket: QueuedTicket) -> float:
        """Seconds of work until a ticket is finished, were it alone."""
        whole = self.costs.alone(ticket.outline)
        return whole * (1 - ticket.step / ticket.steps) if ticket.steps else whole

    @property
    def seconds(self) -> float:
        """Of work before it, were each task drawn alone."""
        return sum(map(self.left, self.tickets.values()))

    def to_json(self) -> dict[str, Any]:
        """Its state for health checks and metrics, as plain values."""
        memory = self.memory
        return {
            "number": self.number,
            "device": self.device,
            "pid": self.supervisor.process_id,
            "restarts": max(0, self.supervisor.starts - 1),
            "error": self.supervisor.why,
            "running": len(self.tickets),
            "seconds": self.seconds,
            "memory": {"resident": memory.resident, "peak": memory.peak, "device": memory.device},
            "runs": dict(self.runs),
            "models": {
                name: {"backend": ready.backend, "opened_in": ready.seconds} for name, ready in self.ready.items()
            },
            "opening": sorted(self.opening),
        }
