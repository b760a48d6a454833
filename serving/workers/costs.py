"""What work takes: seconds of each stage of a picture, measured, refined by what happens, and predicted from there."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Hashable, Mapping
from typing import Any

# The stages of a picture besides its network's runs, and what it takes to merge other weights.
TEXT, ENCODE, DECODE, SWITCH = "text", "encode", "decode", "switch"
STAGES = (TEXT, ENCODE, DECODE, SWITCH)
KEPT = 15  # observations of a place; their lower median counts
FIRST = 3  # before so many the least counts, since first runs are slow
MOST_AREAS = 64  # of a stage; beyond them the one goes of which least is known
MOST_FOUND = 4096  # predictions that are kept
NOTICED = 0.02  # a change of an estimate by less than this fraction leaves predictions that were made as they are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """What a picture will take, as its request tells it.

    Attributes:
        model: the name under which the model is served.
        area: h * w of its latents.
        evaluations: of the denoising network.
        rows: of one of them, 2 where the picture is guided.
        network: the stage under which the network's runs are observed, its form may be left out; "" is the model's
            first.
        pictures: that are encoded before the first run.
        weights: which changes of the weights it needs; () is none.
    """

    model: str
    area: int
    evaluations: int
    rows: int = 2
    network: str = ""
    pictures: int = 0
    weights: Hashable = ()


class Costs:
    """Seconds by model, stage, latent area and rows.

    What was never observed is derived from what was: between two numbers of rows on a line, above them along the last
    line, from one alone in proportion; at another area from the nearest two on a line of logarithms, from one alone in
    proportion. So measure each network at two numbers of rows at least, else nothing is known to be gained by sharing.
    A model of which nothing is known takes no time.

    Attributes:
        revision: grows when predictions change that were made before.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._tables: dict[str, dict[str, _Stage]] = {}
        self._found: dict[tuple[str, str, int, int], float] = {}

    def observe(self, model: str, stage: str, area: int, rows: int, seconds: float) -> None:
        """Take one observation in.

        Args:
            model: its name.
            stage: the denoising network with its form, or ``TEXT``, ``ENCODE`` or ``DECODE`` (rows are pictures), or
                ``SWITCH``.
            area: h * w of the latents; 0 where it does not matter.
            rows: of the run.
            seconds: that it took; what is not finite or negative is passed over.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            return
        stages = self._tables.setdefault(model, {})
        if stages.setdefault(stage, _Stage()).observe(area, rows, seconds):
            self.revision += 1
            self._found.clear()

    def seconds(self, model: str, stage: str, area: int = 0, rows: int = 1) -> float:
        """How long a run of ``stage`` takes; "" or a network that was never seen is the model's first network."""
        key = model, stage, area, rows
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= MOST_FOUND:
                self._found.clear()
            table = self._table(model, stage)
            found = self._found[key] = 0.0 if table is None else table.seconds(area, rows)
        return found

    def alone(self, outline: Outline) -> float:
        """How long a picture takes that shares nothing with another."""
        model, area = outline.model, outline.area
        run = self.seconds(model, outline.network, area, outline.rows)
        return self.preparing(outline) + outline.evaluations * run + self.seconds(model, DECODE, area)

    def preparing(self, outline: Outline) -> float:
        """How long it takes until its first run can begin."""
        pictures = outline.pictures
        encoding = pictures * self.seconds(outline.model, ENCODE, outline.area) if pictures else 0.0
        return self.seconds(outline.model, TEXT) + encoding

    def knows(self, model: str) -> bool:
        """Whether anything was observed of the model's networks."""
        return any(stage not in STAGES for stage in self._tables.get(model, {}))

    def forget(self, model: str) -> None:
        """Know nothing of a model any more."""
        if self._tables.pop(model, None) is not None:
            self.revision += 1
            self._found.clear()

    def to_json(self) -> dict[str, Any]:
        """All observations, as JSON has them; see :meth:`from_json`."""
        return {
            model: {stage: table.to_json() for stage, table in stages.items()} for model, stages in self._tables.items()
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Costs:
        """What :meth:`to_json` gave."""
        costs = cls()
        for model, stages in kept.items():
            for stage, areas in stages.items():
                for area, by_rows in areas.items():
                    for rows, observed in by_rows.items():
                        for seconds in observed:
                            costs.observe(model, stage, int(area), int(rows), float(seconds))
        return costs

    def _table(self, model: str, stage: str) -> _Stage | None:
        stages = self._tables.get(model, {})
        if stage in stages or stage in STAGES:
            return stages.get(stage)
        networks = [name for name in stages if name not in STAGES]
        named = next((name for name in networks if name.startswith(f"{stage} ")), None)
        return stages[named or networks[0]] if networks else None


class _Place:
    """What was observed at one area and number of rows."""

    def __init__(self) -> None:
        self.observed: list[float] = []
        self.estimate = 0.0

    def observe(self, seconds: float) -> bool:
        """Returns whether the estimate has changed enough to be noticed."""
        self.observed = [*self.observed[1 - KEPT :], seconds]
        estimate = min(self.observed) if len(self.observed) < FIRST else statistics.median_low(self.observed)
        if abs(estimate - self.estimate) <= NOTICED * self.estimate:
            return False
        self.estimate = estimate
        return True


class _Stage:
    """One stage of one model: places by area and rows."""

    def __init__(self) -> None:
        self._areas: dict[int, dict[int, _Place]] = {}

    def observe(self, area: int, rows: int, seconds: float) -> bool:
        """Returns whether predictions change; areas stand in the order in which they were seen last."""
        places = self._areas.pop(area, {})
        self._areas[area] = places
        changed = places.setdefault(rows, _Place()).observe(seconds)
        if len(self._areas) > MOST_AREAS:  # how runs grow with their rows was measured at few areas, and is kept
            others = [own for own in self._areas if own != area]
            del self._areas[min(others, key=lambda own: len(self._areas[own]))]
            return True
        return changed

    def to_json(self) -> dict[str, dict[str, list[float]]]:
        return {
            str(area): {str(rows): list(place.observed) for rows, place in places.items()}
            for area, places in self._areas.items()
        }

    def seconds(self, area: int, rows: int) -> float:
        if area in self._areas:
            return self._at(area, rows)
        known = sorted(self._areas)
        if area <= 0 or known[0] <= 0:
            return self._at(known[0], rows)
        if len(known) == 1:
            return self._at(known[0], rows) * area / known[0]
        low, high = _neighbours(known, area)
        below, above = self._at(low, rows), self._at(high, rows)
        if below <= 0 or above <= 0:
            return above * area / high
        power = math.log(above / below) / math.log(high / low)
        nearest = low if area < low else high
        return float(self._at(nearest, rows) * (area / nearest) ** min(max(power, 0.0), 2.0))

    def _at(self, area: int, rows: int) -> float:
        """At an area that was observed."""
        places = self._areas[area]
        if rows in places:
            return places[rows].estimate
        known = sorted(places)
        if len(known) == 1:
            return places[known[0]].estimate * rows / known[0]
        low, high = _neighbours(known, rows)
        below, above = places[low].estimate, places[high].estimate
        slope = max((above - below) / (high - low), 0.0)
        return max(below + slope * (rows - low), min(below, above) * min(rows / high, 1.0))


def _neighbours(known: list[int], value: int) -> tuple[int, int]:
    """The two of ``known``, ascending and at least two, between which ``value`` lies, or that are nearest to it."""
    index = min(max(bisect.bisect(known, value), 1), len(known) - 1)
    return known[index - 1], known[index]
