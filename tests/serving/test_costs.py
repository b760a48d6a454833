"""The table of what work takes: what was seen, what lies between, and what must not spoil it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.serving.workers.costs import (
    DECODE,
    ENCODE,
    FIRST,
    KEPT,
    MOST_AREAS,
    MOST_FOUND,
    SWITCH,
    TEXT,
    Costs,
    Outline,
)

UNET = "unet float16"


def h200() -> Costs:
    costs = Costs()
    for rows, milliseconds in ((2, 6.8), (4, 10.6), (8, 18.9), (16, 35.9)):
        costs.observe("sd1", UNET, 4096, rows, milliseconds)
    return costs


def test_between_and_above_numbers_of_rows_it_is_a_line() -> None:
    costs = h200()
    assert costs.seconds("sd1", UNET, 4096, 8) == 18.9
    assert costs.seconds("sd1", UNET, 4096, 6) == pytest.approx((10.6 + 18.9) / 2)
    assert costs.seconds("sd1", UNET, 4096, 24) == pytest.approx(35.9 + 8 * (35.9 - 18.9) / 8)
    assert costs.seconds("sd1", UNET, 4096, 1) == pytest.approx(6.8 - (10.6 - 6.8) / 2)


def test_from_one_number_of_rows_nothing_is_gained_by_sharing() -> None:
    costs = Costs()
    costs.observe("sd1", UNET, 1024, 2, 3.0)
    assert [costs.seconds("sd1", UNET, 1024, rows) for rows in (1, 2, 8)] == [1.5, 3.0, 12.0]


def test_another_area_is_in_proportion_and_between_two_on_a_line_of_logarithms() -> None:
    costs = h200()
    assert costs.seconds("sd1", UNET, 1024, 4) == pytest.approx(10.6 / 4)
    costs.observe("sd1", UNET, 16384, 2, 6.8 * 4**1.5)
    assert costs.seconds("sd1", UNET, 8192, 2) == pytest.approx(6.8 * 2**1.5)
    assert costs.seconds("sd1", UNET, 65536, 2) == pytest.approx(6.8 * 16**1.5)


def test_a_network_that_was_never_seen_is_the_models_first_and_an_unknown_model_takes_no_time() -> None:
    costs = h200()
    for network in ("", "unet int8"):
        assert costs.seconds("sd1", network, 4096, 2) == 6.8
    assert costs.seconds("sd1", DECODE, 4096) == 0.0
    assert costs.seconds("talbot", "", 4096, 2) == 0.0
    assert (costs.knows("sd1"), costs.knows("talbot")) == (True, False)
    costs.observe("talbot", TEXT, 0, 1, 1.0)
    assert not costs.knows("talbot")


def test_a_picture_alone_is_the_sum_of_its_stages() -> None:
    costs = h200()
    for stage, area, seconds in ((TEXT, 0, 1.0), (ENCODE, 4096, 10.0), (DECODE, 4096, 8.5), (SWITCH, 0, 99.0)):
        costs.observe("sd1", stage, area, 1, seconds)
    outline = Outline(model="sd1", area=4096, evaluations=20, pictures=1)
    assert costs.preparing(outline) == pytest.approx(11.0)
    assert costs.alone(outline) == pytest.approx(1 + 10 + 20 * 6.8 + 8.5)


@given(st.lists(st.floats(1.0, 1.1), min_size=KEPT), st.floats(0, 1e6))
def test_a_slow_first_run_and_outliers_do_not_spoil_it(usual: list[float], outlier: float) -> None:
    costs = Costs()
    for number, seconds in enumerate([outlier + 5, *usual[: FIRST - 1], outlier, *usual[FIRST - 1 :]]):
        costs.observe("sd1", UNET, 4096, 2, seconds)
        if number > 0:
            assert 0 <= costs.seconds("sd1", UNET, 4096, 2) < 1.2
    assert 0.95 < costs.seconds("sd1", UNET, 4096, 2) < 1.15


def test_it_follows_what_has_become_slower() -> None:
    costs = Costs()
    for seconds in [1.0] * 100 + [2.0] * KEPT:
        costs.observe("sd1", UNET, 4096, 2, seconds)
    assert costs.seconds("sd1", UNET, 4096, 2) == 2.0


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_what_is_no_time_is_passed_over(seconds: float) -> None:
    costs = h200()
    costs.observe("sd1", UNET, 4096, 2, seconds)
    assert costs.seconds("sd1", UNET, 4096, 2) == 6.8


def test_its_revision_grows_when_predictions_change() -> None:
    costs = h200()
    before = costs.revision
    costs.observe("sd1", UNET, 4096, 2, 6.81)
    assert costs.revision == before
    for _ in range(2):
        costs.observe("sd1", UNET, 4096, 2, 3.0)
    assert costs.seconds("sd1", UNET, 4096, 2) == 3.0
    assert costs.revision > before


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from([UNET, "unet int8", TEXT, DECODE]),
            st.integers(0, 3),
            st.integers(1, 20),
            st.floats(0, 1e3),
        )
    ),
    st.integers(0, 5),
    st.integers(1, 64),
)
def test_it_survives_json_and_predicts_no_nonsense(
    observed: list[tuple[str, str, int, int, float]], area: int, rows: int
) -> None:
    costs = Costs()
    for one in observed:
        costs.observe(*one)
    again = Costs.from_json(json.loads(json.dumps(costs.to_json())))
    for model in "ab":
        for stage in ("", UNET, TEXT, DECODE):
            found = costs.seconds(model, stage, area, rows)
            assert math.isfinite(found)
            assert found >= 0
            assert again.to_json() == costs.to_json()
            assert again.seconds(model, stage, area, rows) == pytest.approx(found, rel=0.1, abs=1e-9)


def test_what_is_kept_is_bounded_and_how_runs_grow_with_their_rows_is_kept() -> None:
    costs = h200()
    for area in range(1, 3 * MOST_AREAS):
        costs.observe("sd1", UNET, area, 2, area / 1000)
        costs.seconds("sd1", UNET, 10**6 + area, 2)
    kept = costs.to_json()["sd1"][UNET]
    assert len(kept) == MOST_AREAS
    assert costs.seconds("sd1", UNET, 4096, 8) == 18.9
    assert str(3 * MOST_AREAS - 1) in kept and "1" not in kept
    for area in range(2 * MOST_FOUND):
        costs.seconds("sd1", UNET, area, 2)
    assert len(costs._found) <= MOST_FOUND


def test_of_a_model_that_is_forgotten_nothing_is_known() -> None:
    costs, revision = h200(), h200().revision
    costs.forget("sd1")
    assert not costs.knows("sd1") and costs.revision > revision
    assert costs.seconds("sd1", UNET, 4096, 2) == 0.0


def test_a_network_is_named_without_its_form() -> None:
    costs = h200()
    costs.observe("sd1", "unet_controlled+1 float16", 4096, 2, 9.9)
    assert costs.seconds("sd1", "unet_controlled+1", 4096, 2) == 9.9
    assert costs.seconds("sd1", "unet_controlled+2", 4096, 2) == 6.8
