"""The one timing loop of the benchmarks, and how seconds become figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Clock = Callable[[], float]


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    pause: float = 0.0,
    clock: Clock = time.perf_counter,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Make every call once a round, A B C A B C …, so that what else the machine does meets all of them alike.

    Args:
        calls: by name.
        rounds: how many are counted.
        warm_up: rounds before them that are not.
        pause: seconds of sleep before each call; the threads of the one before may wait awake for a while.
        clock: tells seconds.
        before: by name, what is done before a call and not counted.

    Returns:
        The seconds of each call, by round, and what each returned last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    made: dict[str, Any] = {}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            time.sleep(pause)
            if before is not None:
                before[name]()
            start = clock()
            made[name] = call()
            taken = clock() - start
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds, made


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, least and most, rounded to so many decimal places."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def figures(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, in four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in spread(values, 12).items()}


def ratios(seconds: Sequence[float], first: Sequence[float]) -> list[float]:
    """Times of one over those of another in the same rounds."""
    return [own / other for own, other in zip(seconds, first, strict=True)]
