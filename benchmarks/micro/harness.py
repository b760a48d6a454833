"""What every small benchmark shares: rows of forms that take turns, and one shape of results.

A benchmark is a module with a function ``rows(options)`` that yields, one after the other, a :class:`Row` whose forms
are to be timed here, or a :class:`Result` where its process was another one. What a row needs is opened before it is
yielded and closed after it. Where a benchmark has options of its own, ``arguments(parser)`` adds them.

The results have one shape: ``rows``, each with a ``title``, ``facts`` of the row, and ``forms`` by name. A form has
``ms`` (median, least, most), ``ratio`` (its time over that of the row's first form in the same rounds), and figures of
its own, or ``failed`` with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.timing import Clock, figures, in_turns, ratios

Figures = dict[str, Any]
Seconds = Mapping[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One row of results.

    Attributes:
        title: what was computed.
        forms: figures by the name of the form.
        facts: what is true of all forms.
    """

    title: str
    forms: Mapping[str, Figures]
    facts: Figures = dataclasses.field(default_factory=dict)

    def to_json(self) -> Figures:
        """The row as it stands in a file of results."""
        return {"title": self.title, "facts": self.facts, "forms": dict(self.forms)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Several forms of the same work, ready to be timed.

    Attributes:
        title: what is computed.
        forms: by name, a call that does the work once. The others are compared with the first.
        more: further figures of each form, from what each returned last and from its seconds.
        facts: what is true of all forms.
        pause: seconds of sleep before each call.
        clock: what tells the time; the processor's (``time.process_time``) where other programs are in the way.
    """

    title: str
    forms: Mapping[str, Callable[[], Any]]
    more: Callable[[Mapping[str, Any], Seconds], Mapping[str, Figures]] | None = None
    facts: Figures = dataclasses.field(default_factory=dict)
    pause: float = 0.0
    clock: Clock = time.perf_counter

    def timed(self, rounds: int) -> Result:
        """Take the times."""
        seconds, made = in_turns(self.forms, rounds, pause=self.pause, clock=self.clock)
        more = {} if self.more is None else self.more(made, seconds)
        return Result(
            title=self.title,
            forms={name: {**own, **more.get(name, {})} for name, own in times(seconds).items()},
            facts=self.facts,
        )


def times(seconds: Seconds, scale: float = 1.0) -> dict[str, Figures]:
    """``ms`` of each form, and ``ratio`` of all but the first; seconds are of ``1 / scale`` pieces of work."""
    first = next(iter(seconds), None)
    return {
        name: {"ms": figures([second * 1e3 * scale for second in own])}
        | ({} if name == first or first is None else {"ratio": figures(ratios(own, seconds[first]))})
        for name, own in seconds.items()
    }


@dataclasses.dataclass(kw_only=True)
class Options:
    """What was asked for.

    Attributes:
        rounds: how often each form is timed.
        every: of the rows, every so many.
        own: the options that the benchmark added.
        about: what a benchmark adds to the head of its results.
    """

    rounds: int
    every: int = 1
    own: argparse.Namespace = dataclasses.field(default_factory=argparse.Namespace)
    about: Figures = dataclasses.field(default_factory=dict)

    def some(self, rows: Iterable[Any]) -> list[Any]:
        """Those of ``rows`` that are to be measured."""
        return list(rows)[:: self.every]
