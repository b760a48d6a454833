"""The batcher, driven as a worker drives it, over an engine that only counts."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.runtime.denoising.batching import pick
from calotype.runtime.denoising.job import Key, SessionKey
from calotype.serving.workers.batcher import RELUCTANCE, Action, Batcher, Expire, Finish, Prepare, Run, Ticket
from calotype.serving.workers.costs import DECODE, SWITCH, TEXT, Costs, Outline
from calotype.serving.workers.entry import PATIENCE

NETWORK = "unet None"


CAPACITY = 8


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
    """An engine of so many rows a run, without padding, and with these weights open whatever comes."""

    rows: int = CAPACITY
    open: tuple[Hashable, ...] = ()

    def capacity(self, _model: str, _key: Key) -> int:
        return self.rows

    def padded(self, _model: str, _key: Key, rows: int) -> int:
        return rows

    def kept(self, _model: str, weights: Hashable) -> bool:
        return weights in self.open


def key_of(outline: Outline) -> Key:
    return Key(SessionKey("unet", None, outline.weights), (("sample", (4, outline.area // 8, 8)), ("text", (1, 77, 8))))


def costs(*, fixed: float = 2.7, row: float = 2.0) -> Costs:
    """Of runs that take ``fixed + row * rows``; decoding 8, text 1, other weights 5."""
    made = Costs()
    for rows in (2, 4, 8, 16):
        made.observe("model", NETWORK, 64, rows, fixed + row * rows)
    made.observe("model", DECODE, 64, 1, 8.0)
    made.observe("model", TEXT, 0, 1, 1.0)
    made.observe("model", SWITCH, 0, 1, 5.0)
    return made


def ticket(name: str, steps: int, arrived: float = 0.0, **others: Any) -> Ticket:
    outline = {field: others.pop(field) for field in ("area", "rows", "weights") if field in others}
    made = Outline(model="model", evaluations=steps, **{"area": 64, **outline})
    return Ticket(id=name, outline=made, arrived=arrived, **others)


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
        if action is not None:
            self.do(action)
        return action

    def do(self, action: Action) -> None:
        self.actions.append(action)
        if isinstance(action, Expire):
            self.ended += action.ids
            for name in action.ids:
                self.jobs.pop(name, None)
            return
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
                assert self.batcher.remove(name)
                self.ended.append(name)

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
        driver = Driver(Batcher(costs(fixed=fixed, row=row), Room()))
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


def test_a_picture_without_slack_is_not_slowed_down_for_long_ones() -> None:
    for deadline, shared in ((None, 4), (60.0, 1)):
        driver = Driver(Batcher(costs(), Room()))
        for name in "abc":
            driver.add(ticket(name, 50))
        driver.add(ticket("short", 4, deadline=deadline))
        driver.drain()
        runs = [action.ids for action in driver.actions if isinstance(action, Run) and "short" in action.ids]
        assert [len(ids) for ids in runs] == [shared] * 4
        assert driver.ended[0] == "short"


def test_what_cannot_meet_its_deadline_never_reaches_the_engine() -> None:
    driver = Driver(Batcher(costs(), Room()))
    driver.add(ticket("late", 4, deadline=30.0))
    driver.add(ticket("passed", 4, deadline=0.0))
    driver.add(ticket("right", 4, deadline=60.0))
    driver.drain()
    assert driver.actions[0] == Expire(ids=("passed", "late"))
    assert {name for action in driver.actions[1:] for name in action.ids} == {"right"}


def test_priority_makes_a_picture_due_sooner() -> None:
    driver = Driver(Batcher(costs(), Room(2)))
    driver.add(ticket("usual", 10))
    driver.add(ticket("urgent", 10, priority=2.0))
    driver.drain()
    assert driver.ended == ["urgent", "usual"]


@pytest.mark.parametrize(("turns", "runs"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_picture_that_is_skipped_ends_with_the_step_at_hand_and_is_decoded(turns: int, runs: int) -> None:
    """A job that only counts has no steps that are begun: one more of it is made."""
    driver = Driver(Batcher(costs(), Room()))
    driver.add(ticket("a", 10))
    for _ in range(turns):
        driver.turn()
    assert driver.batcher.skip("a")
    driver.drain()
    assert [type(action) for action in driver.actions] == [Prepare, *[Run] * runs, Finish]
    assert driver.ended == ["a"]
    assert not driver.batcher.skip("a")


def test_other_weights_wait_a_little_so_that_they_are_not_merged_at_every_picture() -> None:
    driver = Driver(Batcher(costs(), Room()))
    for number in range(8):
        driver.add(ticket(f"{number}", 3, 0.1 * number, weights="ab"[number % 2]))
    driver.drain()
    weights = [driver.outlines[action.ids[0]].weights for action in driver.actions if isinstance(action, Run)]
    assert sum(one != other for one, other in itertools.pairwise(weights)) == 1


def test_weights_that_are_still_open_do_not_wait() -> None:
    """Going back to them takes no time, so they come in their turn; and nothing is predicted for it."""
    orders = []
    for kept in ((), ("a", "b")):
        driver = Driver(Batcher(costs(), Room(2, open=kept)))
        for number in range(4):
            driver.add(ticket(f"{number}", 3, 0.1 * number, weights="ab"[number % 2]))
        while driver.turn() is not None:
            pass
        orders.append((driver.ended, driver.now))
    assert orders[0][0] == ["0", "2", "1", "3"]
    assert orders[1][0] == ["0", "1", "2", "3"]
    assert orders[0][1] - orders[1][1] >= 5.0  # of a switch


def test_no_more_jobs_are_open_than_may_be() -> None:
    driver = Driver(Batcher(costs(), Room(), most_open=2))
    for number in range(6):
        driver.add(ticket(f"{number}", 3))
    while driver.turn() is not None:
        assert len(driver.jobs) <= 2
    assert len(driver.ended) == 6


def test_an_id_is_held_once() -> None:
    batcher = Batcher(costs(), Room())
    batcher.add(ticket("a", 3))
    with pytest.raises(ValueError, match="a is held already"):
        batcher.add(ticket("a", 3))


@dataclasses.dataclass(frozen=True)
class Story:
    """A picture, and what becomes of it so many turns after it came: it is cancelled, or skipped."""

    ticket: Ticket
    fate: str
    turns: int


@st.composite
def stories(draw: st.DrawFn) -> list[Story]:
    made, now = [], 0.0
    for number in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from([0.0, 0.0, 1.0, 7.0, 40.0, 700.0]))
        patience = draw(st.sampled_from([None, None, 0.0, 30.0, 90.0, 400.0]))
        new = ticket(
            f"{number}",
            draw(st.integers(0, 9)),
            now,
            area=draw(st.sampled_from([64, 128])),
            rows=draw(st.integers(1, 2)),
            weights=draw(st.sampled_from(["", "", "lora"])),
            deadline=None if patience is None else now + patience,
            priority=draw(st.sampled_from([0.5, 1.0, 2.0])),
        )
        made.append(Story(new, draw(st.sampled_from(["", "", "cancelled", "skipped"])), draw(st.integers(0, 20))))
    return made


def told(driver: Driver, told_stories: Sequence[Story], known: Costs, *, bounded: bool) -> list[str]:
    """Live through ``told_stories``, and check every turn; returns what was cancelled."""
    coming, came, cancelled, turn = list(told_stories), dict[str, int](), list[str](), 0
    by_name = {story.ticket.id: story for story in told_stories}
    while coming or driver.batcher.ids:
        while coming and coming[0].ticket.arrived <= driver.now:
            came[coming[0].ticket.id] = turn
            driver.add(coming.pop(0).ticket)
        for name, since in came.items():
            if by_name[name].turns == turn - since:
                if by_name[name].fate == "skipped":
                    driver.batcher.skip(name)
                elif by_name[name].fate == "cancelled" and driver.batcher.remove(name):
                    driver.jobs.pop(name, None)
                    cancelled.append(name)
        held, begin, turn = set(driver.batcher.ids), driver.now, turn + 1
        jobs = dict(driver.jobs)
        before = {name: job.evaluations_to_come for name, job in jobs.items()}
        action = driver.batcher.next(begin)
        assert (action is None) == (not held), "idle with work, or busy without"
        if action is None:
            driver.now = max(driver.now, coming[0].ticket.arrived) if coming else driver.now
            continue
        assert action.ids
        assert set(action.ids) <= held
        assert len(set(action.ids)) == len(action.ids)
        driver.do(action)
        if isinstance(action, Expire):
            assert all(by_name[name].ticket.deadline is not None for name in action.ids)
            continue
        deadlines = [by_name[name].ticket.deadline for name in action.ids]
        assert all(deadline is None or begin < deadline for deadline in deadlines), "work for nobody"
        if isinstance(action, Run):
            run = [jobs[name] for name in action.ids]
            assert pick(run, lambda _: CAPACITY) == run, "jobs that may not share a run"
            assert all(before[name] > 0 for name in action.ids)
        if bounded and isinstance(action, Run | Finish):
            first = by_name[action.ids[0]].ticket
            for name in held - set(action.ids):
                assert first.arrived < last_due(by_name[name].ticket, known), f"{first.id} starves {name}"
    return cancelled


def last_due(waiting: Ticket, known: Costs) -> float:
    """From when on nobody who arrives comes before it."""
    due = waiting.arrived + PATIENCE * known.alone(waiting.outline) / waiting.priority
    due = due if waiting.deadline is None else min(due, waiting.deadline)
    return due + RELUCTANCE * known.seconds("model", SWITCH)


@settings(max_examples=150, deadline=None)
@given(stories(), st.sampled_from([1, 2, 64]))
def test_whatever_comes_every_picture_ends_once_and_nobody_starves(told_stories: list[Story], most_open: int) -> None:
    actions = []
    for _ in range(2):
        known = costs()
        driver = Driver(Batcher(known, Room(), most_open=most_open))
        cancelled = told(driver, told_stories, known, bounded=most_open == 64)
        assert sorted(driver.ended + cancelled) == sorted(story.ticket.id for story in told_stories)
        assert (len(driver.batcher.ids), driver.batcher.running, driver.batcher.seconds, driver.jobs) == (0, 0, 0, {})
        actions.append(driver.actions)
    assert actions[0] == actions[1], "the same again is not the same"


def test_nobody_waits_longer_than_until_it_is_due_while_short_ones_keep_coming() -> None:
    """More short pictures than can be drawn: a long one still comes first when it is due."""
    driver = Driver(Batcher(costs(), Room(2)))
    driver.add(ticket("long", 10))
    number = 0
    alone = costs().alone(ticket("long", 10).outline)
    while "long" not in driver.ended:
        assert driver.now < PATIENCE * alone + 2 * alone
        while 20.0 * number <= driver.now:
            driver.add(ticket(f"{number}", 3, 20.0 * number))
            number += 1
        driver.turn()
    assert PATIENCE * alone * 0.8 < driver.now, "it was served long before: these are not more than can be drawn"


def test_nothing_is_kept_of_what_was_removed() -> None:
    driver = Driver(Batcher(costs(), Room()))
    for name in "ab":
        driver.add(ticket(name, 5))
    for _ in range(4):
        driver.turn()
    kept = [weakref.ref(job) for job in driver.jobs.values()]
    assert len(kept) == 2
    driver.batcher.remove("a")
    driver.batcher.moved(["a"])  # the run that it was in ends only now
    driver.batcher.prepared({"a": driver.jobs.pop("a")})
    driver.drain()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
