"""The server's batcher in simulated time, beside other policies: ``python -m benchmarks.serving_simulation``, JSON.

Step times come from a file that ``python -m benchmarks.gpu`` has written, so that after it one command repeats this on
another GPU: ``python -m benchmarks.serving_simulation --times benchmarks/results/<gpu>.json --write``. Goodput is the
largest load at which 95 of 100 pictures that are asked for are finished within so many times their lone latency, in
units of what one picture at a time can carry; between two loads it is on a line.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, origin, write
from benchmarks.serving_policies import POLICIES, Kind, Times, World, traffic, within

MIXES: dict[str, tuple[Kind, ...]] = {
    "50 steps": (Kind(steps=50),),
    "50 and 4 steps": (Kind(steps=50), Kind(steps=4)),
    "50, 20 and 4 steps": (Kind(steps=50), Kind(steps=20), Kind(steps=4)),
    "50, 20 and 4 steps at 384, 512 and 768 pixels": tuple(
        Kind(steps=steps, side=side) for steps in (50, 20, 4) for side in (48, 64, 96)
    ),
}
SLOS = (2, 5, 10, 20)
LOADS = tuple(round(0.1 * number, 1) for number in range(1, 17))
PROCESSES = 4
WANTED = 0.95
FOLLOWED = 0.5  # loads above one at which fewer are in time are left out
ASSUMES = (
    "arrivals are Poisson's, and each picture's kind is drawn evenly",
    "a run takes what was measured of so many guided pictures of 512 x 512 in a call, host time included; between the "
    "numbers that were measured it is on a line, after rows are padded as on a GPU",
    "encoding and decoding take what was measured, one picture at a time",
    "at other sizes a part of a run stays, and the rest goes with the area; so does decoding",
    "every time is the same each time, and predictions are right",
    "pictures of one size share a run whatever their steps; nothing else is in the way: no HTTP, no other process",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print, and write where that is asked for."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_simulation", description=__doc__)
    parser.add_argument("--times", type=Path, default=RESULTS / "nvidia-h200.json", help="what benchmarks.gpu wrote")
    parser.add_argument("--model", default="sd1", help="in that file; default: sd1")
    parser.add_argument("--pictures", type=int, default=400, help="of a point; default: 400")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals; default: 0")
    parser.add_argument("--write", action="store_true", help=f"write the figures into {RESULTS.name}/, too")
    options = parser.parse_args(given)
    report = json.loads(options.times.read_text())
    backend, times = measured(report, options.model)
    command = " ".join(["python -m benchmarks.serving_simulation", *(word for word in given if word != "--write")])
    made = {
        **origin(command, "benchmarks/serving_simulation.py", "benchmarks/serving_policies.py", "serving"),
        "machine": machine(),
        "simulated": True,
        "assumes": list(ASSUMES),
        "times": {
            "file": options.times.name,
            "gpu": report["gpu"]["name"],
            "model": options.model,
            "backend": backend,
            "step_ms_by_pictures": {str(count): round(1e3 * seconds, 3) for count, seconds in times.runs.items()},
            "text_ms": round(1e3 * times.text, 3),
            "decode_ms": round(1e3 * times.decode, 3),
        },
        "pictures": options.pictures,
        "seed": options.seed,
        "loads": list(LOADS),
        "wanted": WANTED,
        "mixes": simulate(times, options.pictures, options.seed),
    }
    print(json.dumps(made, indent=2))
    if options.write:
        write(RESULTS / f"simulation-serving-{options.times.stem}.json", made)


def measured(report: Mapping[str, Any], model: str) -> tuple[str, Times]:
    """The first backend of which all that is needed was measured, and its times."""
    for backend, record in report["models"].get(model, {}).items():
        if isinstance(record.get("images_in_a_call"), list) and "stages_ms" in record.get("pictures", {}):
            return backend, Times.of(record)
    raise SystemExit(f"the file has no times of several pictures in a call of {model}; run: python -m benchmarks.gpu")


def simulate(times: Times, pictures: int, seed: int) -> dict[str, Any]:
    """By traffic: goodput by SLO and policy, with deadlines that the server is told and without; and the curves."""
    points = [(name, told, slo) for name in MIXES for told in (True, False) for slo in SLOS]
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(point, *zip(*((times, *key, pictures, seed) for key in points), strict=True)))
    made: dict[str, Any] = {name: {"goodput_told": {}, "goodput_not_told": {}, "in_time": {}} for name in MIXES}
    for (name, told, slo), curves in zip(points, found, strict=True):
        goodputs = made[name]["goodput_told" if told else "goodput_not_told"]
        goodputs[str(slo)] = {policy: goodput(values) for policy, values in curves.items()}
        if told:
            made[name]["in_time"][str(slo)] = {policy: " ".join(map(str, values)) for policy, values in curves.items()}
    return made


def point(times: Times, name: str, told: bool, slo: float, pictures: int, seed: int) -> dict[str, list[float]]:
    """The curves of all policies."""
    kinds = MIXES[name]
    world = World(times.costs([kind.side for kind in kinds]), times.most, slo, told)
    return {policy: curve(kinds, world, policy, pictures, seed) for policy in POLICIES}


def curve(kinds: Sequence[Kind], world: World, policy: str, pictures: int, seed: int) -> list[float]:
    """The fraction in time at each of ``LOADS``, up to the first at which it is below ``FOLLOWED``."""
    values: list[float] = []
    for load in LOADS:
        arrivals = traffic(kinds, world, load, pictures, seed)
        values.append(round(within(arrivals, POLICIES[policy](arrivals, world), world.slo), 4))
        if values[-1] < FOLLOWED:
            break
    return values


def goodput(values: Sequence[float]) -> float:
    """The load at which the fraction in time falls below ``WANTED``; the last of ``LOADS`` where it never does."""
    load, fraction = 0.0, 1.0
    for next_load, value in zip(LOADS, values, strict=False):
        if value < WANTED:
            return round(load + (next_load - load) * (fraction - WANTED) / (fraction - value), 3)
        load, fraction = next_load, value
    return LOADS[-1]


if __name__ == "__main__":
    main()
