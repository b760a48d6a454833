"""A server in simulated time: Poisson arrivals, and what becomes of them under each policy; no clock, no session.

Step-level batching is the class ``Batcher`` of :mod:`calotype.serving.workers.batcher` itself, driven as a worker
drives it. The others are what servers do without it: one picture at a time, and whole requests in batches of pictures
of one size and number of steps. Each of those serves in order of arrival or the shortest first, and under each policy a
picture whose deadline cannot be met any more, even if it came next and alone, is given up at once; whole requests take
along no more than can be finished before the first deadline among them.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from calotype.runtime.denoising.job import Key, SessionKey
from calotype.runtime.sessions.staged import padded
from calotype.serving.workers.batcher import Batcher, Expire, Finish, Prepare, Run, Ticket
from calotype.serving.workers.costs import DECODE, TEXT, Costs, Outline

MODEL, NETWORK = "model", "unet None"
SIDE = 64  # of the latents that times were measured at
GUIDED = 2  # rows of a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One sort of picture in the traffic: its steps, the side of its latents, and how many of all pictures it is."""

    steps: int
    side: int = SIDE
    share: float = 1.0

    @property
    def outline(self) -> Outline:
        """What the batcher is told."""
        return Outline(model=MODEL, area=self.side**2, evaluations=self.steps, rows=GUIDED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """What was measured, in seconds, of pictures of 512 x 512 pixels.

    Attributes:
        runs: by the pictures that share a run, guided, host time included.
        text: encoding a prompt.
        decode: from latents to pixels on the host.
    """

    runs: Mapping[int, float]
    text: float
    decode: float

    @property
    def most(self) -> int:
        """Pictures of a run of that size."""
        return max(self.runs)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Times:
        """Of what ``python -m benchmarks.gpu`` has written of one model on one backend."""
        stages = record["pictures"]["stages_ms"]
        return cls(
            runs={item["images"]: item["step_s"] for item in record["images_in_a_call"]},
            text=stages["text_encoder"] / 1e3,
            decode=stages["vae_decoder"] / 1e3,
        )

    def costs(self, sides: Sequence[int]) -> Costs:
        """The table for latents of those sides: a run has a part that stays, the rest and decoding go with the area."""
        costs = Costs()
        fixed = max(2 * self.runs[1] - self.runs[2], 0.0)
        for side in sorted(set(sides)):
            scale = (side / SIDE) ** 2
            for pictures, seconds in self.runs.items():
                costs.observe(MODEL, NETWORK, side**2, GUIDED * pictures, fixed + (seconds - fixed) * scale)
            costs.observe(MODEL, DECODE, side**2, 1, self.decode * scale)
        costs.observe(MODEL, TEXT, 0, 1, self.text)
        return costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One picture that is asked for; ``lone`` is what it takes on an idle server."""

    number: int
    time: float
    kind: Kind
    lone: float


@dataclasses.dataclass(frozen=True)
class World:
    """What all policies have in common.

    Attributes:
        costs: seconds.
        most: guided pictures of a run of the largest size.
        slo: a picture is due within so many times its lone latency.
        told: whether that is its deadline, or the server does not know.
    """

    costs: Costs
    most: int
    slo: float
    told: bool = True

    def deadline(self, arrival: Arrival) -> float | None:
        """When it is given up."""
        return arrival.time + self.slo * arrival.lone if self.told else None

    def run(self, kind: Kind, pictures: int) -> float:
        """Seconds of a run."""
        return self.costs.seconds(MODEL, NETWORK, kind.side**2, padded(GUIDED * pictures))

    def whole(self, kind: Kind, pictures: int) -> float:
        """Seconds of so many pictures from their prompts to their pixels."""
        each = self.costs.seconds(MODEL, TEXT) + self.costs.seconds(MODEL, DECODE, kind.side**2)
        return kind.steps * self.run(kind, pictures) + pictures * each

    def in_time(self, batch: list[Arrival], now: float) -> list[Arrival]:
        """The first so many of ``batch`` that none is late for it, where deadlines are known; one at least."""
        while len(batch) > 1 and self.told:
            end = now + self.whole(batch[0].kind, len(batch))
            if all(end <= item.time + self.slo * item.lone for item in batch):
                break
            batch = batch[:-1]
        return batch

    def hopeless(self, arrival: Arrival, now: float) -> bool:
        """Whether it would be late even if it came next."""
        deadline = self.deadline(arrival)
        return deadline is not None and now + arrival.lone > deadline


def traffic(kinds: Sequence[Kind], world: World, load: float, number: int, seed: int) -> list[Arrival]:
    """So many arrivals at ``load`` times the rate that one picture at a time can carry; of one seed the same."""
    rng = random.Random(seed)
    lone = {kind: world.whole(kind, 1) for kind in kinds}
    mean = sum(kind.share * lone[kind] for kind in kinds) / sum(kind.share for kind in kinds)
    arrivals, now = [], 0.0
    for index in range(number):
        now += rng.expovariate(load / mean)
        (kind,) = rng.choices(kinds, [kind.share for kind in kinds])
        arrivals.append(Arrival(number=index, time=now, kind=kind, lone=lone[kind]))
    return arrivals


# By a picture's number: when it was finished; those that were given up are missing.
Ends = dict[int, float]
Policy = Callable[[Sequence[Arrival], World], Ends]


def by_arrival(arrival: Arrival) -> tuple[float, int]:
    """An order."""
    return arrival.time, arrival.number


def shortest_first(arrival: Arrival) -> tuple[float, int]:
    """Another."""
    return arrival.lone, arrival.number


def requests(order: Callable[[Arrival], tuple[float, int]], most: int | None) -> Policy:
    """Whole requests, up to ``most`` alike at once (None is what a run takes), to their end."""

    def policy(arrivals: Sequence[Arrival], world: World) -> Ends:
        ends: Ends = {}
        waiting: list[tuple[tuple[float, int], Arrival]] = []
        coming, now = 0, 0.0
        while coming < len(arrivals) or waiting:
            if not waiting:
                now = max(now, arrivals[coming].time)
            while coming < len(arrivals) and arrivals[coming].time <= now:
                heapq.heappush(waiting, (order(arrivals[coming]), arrivals[coming]))
                coming += 1
            waiting = [(rank, item) for rank, item in waiting if not world.hopeless(item, now)]
            if not waiting:
                continue
            heapq.heapify(waiting)
            head = waiting[0][1]
            alike = [item for _, item in sorted(waiting, key=lambda pair: pair[0]) if item.kind == head.kind]
            batch = world.in_time(alike[: world.most if most is None else most], now)
            now += world.whole(head.kind, len(batch))
            ends |= {item.number: now for item in batch}
            waiting = [(rank, item) for rank, item in waiting if item not in batch]
            heapq.heapify(waiting)
        return ends

    return policy


@dataclasses.dataclass(eq=False)
class SimulatedJob:
    """A job that only counts."""

    key: Key
    evaluations_to_come: int
    rows: int = GUIDED

    @property
    def done(self) -> bool:
        """See :class:`calotype.serving.workers.batcher.Work`."""
        return self.evaluations_to_come == 0

    def end_early(self) -> None:
        """See :class:`calotype.serving.workers.batcher.Work`."""
        self.evaluations_to_come = min(self.evaluations_to_come, 1)


@dataclasses.dataclass(frozen=True)
class SimulatedEngine:
    """Runs of so many rows, padded as on a GPU."""

    rows: int

    def capacity(self, _model: str, _key: Key) -> int:
        """See :class:`calotype.serving.workers.batcher.Engine`."""
        return self.rows

    def padded(self, _model: str, _key: Key, rows: int) -> int:
        """See :class:`calotype.serving.workers.batcher.Engine`."""
        return padded(rows)

    def kept(self, _model: str, weights: Hashable) -> bool:
        return False


def steps(arrivals: Sequence[Arrival], world: World) -> Ends:
    """The server's own batcher."""
    batcher = Batcher(world.costs, SimulatedEngine(GUIDED * world.most))
    jobs: dict[str, SimulatedJob] = {}
    ends: Ends = {}
    coming, now = 0, 0.0
    while True:
        while coming < len(arrivals) and arrivals[coming].time <= now:
            batcher.add(_ticket(arrivals[coming], world))
            coming += 1
        action = batcher.next(now)
        if action is None:
            if coming == len(arrivals):
                return ends
            now = arrivals[coming].time
            continue
        if isinstance(action, Expire):
            for name in action.ids:
                jobs.pop(name, None)
            continue
        now += action.seconds
        if isinstance(action, Prepare):
            made = {name: _job(arrivals[int(name)].kind) for name in action.ids}
            jobs |= made
            batcher.prepared(made)
        elif isinstance(action, Run):
            for name in action.ids:
                jobs[name].evaluations_to_come -= 1
            batcher.moved(action.ids)
        elif isinstance(action, Finish):
            for name in action.ids:
                del jobs[name]
                batcher.remove(name)
                ends[int(name)] = now


def _ticket(arrival: Arrival, world: World) -> Ticket:
    return Ticket(
        id=str(arrival.number),
        outline=arrival.kind.outline,
        arrived=arrival.time,
        deadline=world.deadline(arrival),
    )


def _job(kind: Kind) -> SimulatedJob:
    layout = (("sample", (4, kind.side, kind.side)), ("encoder_hidden_states", (1, 77, 768)))
    return SimulatedJob(key=Key(SessionKey("unet"), layout), evaluations_to_come=kind.steps)


POLICIES: dict[str, Policy] = {
    "one at a time": requests(by_arrival, 1),
    "one at a time, shortest first": requests(shortest_first, 1),
    "whole requests": requests(by_arrival, None),
    "whole requests, shortest first": requests(shortest_first, None),
    "steps": steps,
}


def stretches(arrivals: Sequence[Arrival], ends: Ends) -> list[float]:
    """The latency of each that was finished over its lone latency, ascending."""
    return sorted((ends[item.number] - item.time) / item.lone for item in arrivals if item.number in ends)


def within(arrivals: Sequence[Arrival], ends: Ends, slo: float) -> float:
    """The fraction of all that were finished within ``slo`` times their lone latency."""
    return sum(value <= slo * (1 + 1e-9) for value in stretches(arrivals, ends)) / len(arrivals)
