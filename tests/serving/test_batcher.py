"""The batcher, driven as a worker drives it, over an engine that only counts."""

from __future__ import annotations

import dataclasses

from calotype.runtime.denoising.job import Key, SessionKey
from calotype.serving.batcher import Action, Batcher, Expire, Finish, Prepare, Run, Ticket
from calotype.serving.costs import DECODE, TEXT, Costs, Outline

NETWORK = "unet None"


@dataclasses.dataclass(eq=False)
class CountedJob:
    """A job that only counts."""

    key: Key
    rows: int
    evaluations_to_come: int

    @property
    def done(self) -> bool:
        return self.evaluations_to_come == 0

    def end_early(self) -> None:
        self.evaluations_to_come = min(self.evaluations_to_come, 1)


@dataclasses.dataclass
class Room:
    """An engine of so many rows a run, without padding."""

    rows: int = 16

    def capacity(self, _model: str, _key: Key) -> int:
        return self.rows

    def padded(self, _model: str, _key: Key, rows: int) -> int:
        return rows


def key_of(outline: Outline) -> Key:
    return Key(SessionKey("unet", None, outline.weights), (("sample", (4, outline.area // 8, 8)), ("text", (1, 77, 8))))


def costs(*, fixed: float = 2.7, row: float = 2.0) -> Costs:
    """Of runs that take ``fixed + row * rows``; decoding 8, text 1."""
    made = Costs()
    for rows in (2, 4, 8, 16):
        made.observe("model", NETWORK, 64, rows, fixed + row * rows)
    made.observe("model", DECODE, 64, 1, 8.0)
    made.observe("model", TEXT, 0, 1, 1.0)
    return made


def ticket(name: str, steps: int, arrived: float = 0.0, *, area: int = 64) -> Ticket:
    return Ticket(id=name, outline=Outline(model="model", area=area, evaluations=steps), arrived=arrived)


class Driver:
    """Does what the batcher says; its clock goes on by what each action is predicted to take."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher, self.now = batcher, 0.0
        self.jobs: dict[str, CountedJob] = {}
        self.outlines: dict[str, Outline] = {}
        self.actions: list[Action] = []
        self.ended: list[str] = []

    def add(self, new: Ticket) -> None:
        self.outlines[new.id] = new.outline
        self.batcher.add(new)

    def turn(self) -> Action | None:
        action = self.batcher.next(self.now)
        if action is None:
            return None
        self.actions.append(action)
        if isinstance(action, Expire):
            self.ended += action.ids
            return action
        self.now += action.seconds
        if isinstance(action, Prepare):
            for name in action.ids:
                own = self.outlines[name]
                self.jobs[name] = CountedJob(key_of(own), own.rows, own.evaluations)
            self.batcher.prepared({name: self.jobs[name] for name in action.ids})
        elif isinstance(action, Run):
            for name in action.ids:
                self.jobs[name].evaluations_to_come -= 1
            self.batcher.moved(action.ids)
        else:
            for name in action.ids:
                assert self.jobs.pop(name).done
                self.batcher.remove(name)
                self.ended.append(name)
        return action

    def drain(self) -> None:
        while self.turn() is not None:
            pass


def test_a_picture_is_prepared_drawn_and_decoded() -> None:
    driver = Driver(Batcher(costs(), Room()))
    driver.add(ticket("a", 3))
    driver.drain()
    assert [type(action) for action in driver.actions] == [Prepare, Run, Run, Run, Finish]
    assert driver.now == 1 + 3 * 6.7 + 8


def test_alike_pictures_share_runs_where_that_gains() -> None:
    for fixed, row, shared in ((2.7, 2.0, 4), (0.0, 2.0, 1)):
        driver = Driver(Batcher(costs(fixed=fixed, row=row), Room(8)))
        for name in "abcdef":
            driver.add(ticket(name, 3))
        driver.drain()
        assert max(len(action.ids) for action in driver.actions if isinstance(action, Run)) == shared


def test_a_short_picture_overtakes_a_long_one() -> None:
    driver = Driver(Batcher(costs(), Room(2)))
    driver.add(ticket("long", 50))
    for _ in range(5):
        driver.turn()
    driver.add(ticket("short", 4, driver.now))
    driver.drain()
    assert driver.ended == ["short", "long"]
