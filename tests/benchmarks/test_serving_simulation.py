"""The simulated server: it is the server's own batcher, the same each time, and better where that is clear."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from benchmarks import serving_simulation
from benchmarks.machine import RESULTS
from benchmarks.serving_policies import POLICIES, Kind, Times, World, stretches, traffic, within
from benchmarks.serving_simulation import MIXES, curve, goodput, measured

MIXED = MIXES["50 and 4 steps"]


@pytest.fixture(scope="module")
def times() -> Times:
    return measured(json.loads((RESULTS / "nvidia-h200.json").read_text()), "sd1")[1]


def world(times: Times, kinds: Sequence[Kind], slo: float, *, told: bool = True) -> World:
    return World(times.costs([kind.side for kind in kinds]), times.most, slo, told)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lone_picture_takes_its_lone_latency_and_the_same_again_is_the_same(times: Times, policy: str) -> None:
    own = world(times, MIXED, 5)
    lone = traffic(MIXED, own, 1e-6, 20, 0)
    assert stretches(lone, POLICIES[policy](lone, own)) == pytest.approx([1.0] * 20)
    busy = [traffic(MIXED, own, 1.0, 60, 0) for _ in range(2)]
    assert busy[0] == busy[1]
    assert POLICIES[policy](busy[0], own) == POLICIES[policy](busy[1], own)


def test_a_lone_latency_is_what_was_measured_of_a_whole_picture(times: Times) -> None:
    report = json.loads((RESULTS / "nvidia-h200.json").read_text())
    backend, _ = measured(report, "sd1")
    own = report["models"]["sd1"][backend]["pictures"]["picture_ms"]
    lone = 1e3 * world(times, MIXED, 5).whole(Kind(steps=50), 1)
    assert own["min"] < lone < own["max"]


def test_nothing_is_finished_before_it_can_be_and_everything_is_finished_where_nothing_is_due(times: Times) -> None:
    own = world(times, MIXED, 2, told=False)
    arrivals = traffic(MIXED, own, 1.2, 80, 1)
    for policy in POLICIES.values():
        ends = policy(arrivals, own)
        assert len(ends) == len(arrivals)
        assert stretches(arrivals, ends)[0] >= 1 - 1e-9


def test_mixed_traffic_at_eight_tenths_is_in_time_with_steps_alone(times: Times) -> None:
    own = world(times, MIXED, 5)
    arrivals = traffic(MIXED, own, 0.8, 150, 0)
    found = {name: within(arrivals, policy(arrivals, own), 5) for name, policy in POLICIES.items()}
    assert found.pop("steps") > 0.95
    assert max(found.values()) < 0.9


def test_goodput_lies_where_the_fraction_in_time_falls_below_what_is_wanted() -> None:
    assert goodput([1.0, 0.97, 0.93]) == pytest.approx(0.25)
    assert goodput([0.9]) == pytest.approx(0.05)
    assert goodput([0.99] * len(serving_simulation.LOADS)) == serving_simulation.LOADS[-1]


def test_loads_are_followed_until_most_are_late(times: Times) -> None:
    own = world(times, MIXED, 2, told=False)
    values = curve(MIXED, own, "one at a time", 60, 0)
    assert values[-1] < serving_simulation.FOLLOWED
    assert all(value >= serving_simulation.FOLLOWED for value in values[:-1])


def test_a_file_without_several_pictures_in_a_call_says_what_to_run() -> None:
    with pytest.raises(SystemExit, match=r"run: python -m benchmarks\.gpu"):
        measured({"models": {"sd1": {"cuda": {"pictures": {}}}}}, "sd1")
