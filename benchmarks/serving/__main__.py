"""Servers under the same Poisson traffic; every point is written when it is measured, and not measured again.

A load of 1 is what one request at a time can carry: one over the time that a request takes on the first of the
servers while it is idle, on average over the traffic's numbers of steps. Latency counts from the time at which a
request was due.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import model
from benchmarks.environments import WORK
from benchmarks.machine import machine, origin, results, write
from benchmarks.serving.servers import SERVERS, memory, running
from calotype.runtime.diagnostics.load import Traffic, offer, report

LONE = 5  # requests that a lone latency is the median of
SLO = 5.0  # times the lone latency of the traffic's longest request


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and print where the figures lie."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("subject", choices=("talbot", "sd1"))
    parser.add_argument("--size", type=int, help="pixels of a side; the model's own where it is not given")
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="of a request; each as often as the others")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--requests", type=int, default=500, help="of a point, on average")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args(arguments)
    options.work.mkdir(exist_ok=True)
    subject = model(options.subject, options.work)
    size = options.size or subject.size
    mix = "-".join(map(str, options.steps))
    path = results(f"serving-{options.subject}-{size}-steps{mix}")
    found = json.loads(path.read_text()) if path.exists() else _empty(options.subject, size, mix)
    traffic = Traffic(rate=1.0, duration=1.0, steps=tuple(options.steps), size=f"{size}x{size}", timeout=3600.0)
    for load in options.loads:
        for name in options.servers:
            if any((row["load"], row["server"]) == (load, name) for row in found["points"]):
                continue
            with running(name, subject, size, options.work) as (url, pid):
                lone = found["lone_s"].setdefault(name, _lone(url, traffic))
                carried = found["carried_s"] = found.get("carried_s", lone)  # the first's, for all loads of this file
                rate = load / statistics.mean(carried.values())
                slo = SLO * max(carried.values())
                own = dataclasses.replace(traffic, rate=rate, duration=options.requests / rate, slo=slo)
                row = report(offer(url, own), own)
                used = memory(pid)
            found["points"].append(
                {"load": load, "server": name, "memory_mb": round(used), "machine": machine(), **row}
            )
            write(path, found)
            print(f"{SERVERS[name].title}, load {load:g}: {row['groups']}", flush=True)
    print(path)


def _empty(subject: str, size: int, mix: str) -> dict[str, Any]:
    command = f"python -m benchmarks.serving {subject} --size {size} --steps {mix.replace('-', ' ')}"
    return {**origin(command), "machine": machine(), "lone_s": {}, "points": []}


def _lone(url: str, traffic: Traffic) -> dict[str, float]:
    """Median seconds of a request by its number of steps, on a server that has nothing else to do."""
    found = {}
    for steps in traffic.steps:
        one = _Single(rate=1.0, duration=1.0, steps=(steps,), size=traffic.size, timeout=traffic.timeout)
        seconds = [answer.latency for _ in range(LONE + 1) for answer in offer(url, one)]
        found[str(steps)] = statistics.median(seconds[1:])
        time.sleep(0.2)
    return found


class _Single(Traffic):
    """One request, at once."""

    def arrivals(self) -> list[tuple[float, dict[str, Any]]]:
        """See :class:`Traffic`."""
        body = {"prompt": self.prompt, "seed": 0, "num_inference_steps": self.steps[0], "size": self.size}
        return [(0.0, body)]


if __name__ == "__main__":
    main()
