"""Cold starts beside peers: ``python -m benchmarks.cold``. From the start of a process to its first picture.

Calotype and each peer start in turns, with what they read in the system's cache, and (``_cold``) dropped from it: the
model's files and the installed packages. The picture is of ``--steps`` steps. Writes ``results/cold-…``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import environments, speed
from benchmarks.checkpoints import MODELS, model
from benchmarks.environments import WORK
from benchmarks.machine import machine, origin, results
from benchmarks.peers import CALOTYPE, PEERS
from benchmarks.peers.protocol import Task
from benchmarks.timing import spread
from benchmarks.workers import PeerError
from calotype.runtime.diagnostics.benchmark import drop_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Seconds of one process: importing, opening the model, and all up to its first picture."""

    imports: float
    load: float
    total: float


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="talbot")
    parser.add_argument("--size", type=int, help="pixels of a side; default: the model's own")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=[name for name in PEERS if name != CALOTYPE], metavar="PEER")
    arguments = parser.parse_args()
    chosen = model(arguments.model, WORK / "benchmarks")
    plan = speed.Plan(
        model=chosen, size=arguments.size or chosen.size, steps=arguments.steps, images=1, rounds=arguments.rounds
    )
    path = results(f"cold-{plan.model.name}-{plan.size}")
    for peer in arguments.peers or PEERS:
        if peer != CALOTYPE and chosen.name in PEERS[peer].models:
            speed.merge(path, peer, compare(plan, peer), plan)
            print(line(path, peer), flush=True)


def compare(plan: speed.Plan, peer: str) -> dict[str, Any]:
    """Starts of Calotype and ``peer`` in turns; or ``not_run`` and why."""
    report: dict[str, Any] = {
        **origin(plan.command("benchmarks.cold", peer)),
        "machine": machine(),
        "rounds": plan.rounds,
    }
    places = {name: speed.source(name, plan.model, WORK) for name in (CALOTYPE, peer)}
    for kind in ("warm", "cold"):
        starts: dict[str, list[Start]] = {name: [] for name in places}
        with tempfile.TemporaryDirectory() as folder:
            task = speed.new_task(plan, Path(folder))
            try:
                for _ in range(plan.rounds):
                    for name, place in places.items():
                        if kind == "cold":
                            forget(name, place)
                        starts[name].append(start(name, place, task))
            except PeerError as error:
                return {**report, "not_run": str(error)}
        for name, side in ((CALOTYPE, "calotype"), (peer, "peer")):
            figures = report.setdefault(
                side, {"installed_mb": round(environments.size(_home(name), WORK / "peers") / 1e6)}
            )
            figures[kind] = {
                field.name: spread([getattr(item, field.name) for item in starts[name]], 3)
                for field in dataclasses.fields(Start)
            }
        ratios = [theirs.total / ours.total for ours, theirs in zip(starts[CALOTYPE], starts[peer], strict=True)]
        report[f"ratio_{kind}"] = spread(ratios, 2)
    return report


def start(name: str, place: Path, task: Task) -> Start:
    """Start the peer ``name``, have one picture drawn, and end it."""
    with speed.new_worker(name, WORK) as process:
        opened = process.load(place, PEERS[name].mode)
        process.generate(task)
        return Start(imports=opened["import"], load=opened["load"], total=time.perf_counter() - process.started)


def forget(name: str, place: Path) -> None:
    """Drop the model and the environment of the peer ``name`` from the system's cache."""
    folders = (place, WORK / "peers" / _home(name) / "lib")
    drop_cache(path for folder in folders for path in folder.rglob("*") if path.is_file())


def line(path: Path, peer: str) -> str:
    """The figures of ``peer`` in the file of results at ``path``, for a person."""
    pair = json.loads(path.read_text())["pairs"][peer]
    if "not_run" in pair:
        return f"{peer:<25} not run: {pair['not_run']}"
    seconds = {
        kind: f"{pair['peer'][kind]['total']['median']:.2f} s against {pair['calotype'][kind]['total']['median']:.2f} s"
        for kind in ("warm", "cold")
    }
    return (
        f"{peer:<25} {pair['ratio_warm']['median']:.1f} times Calotype's start: {seconds['warm']}; "
        f"with nothing cached {pair['ratio_cold']['median']:.1f} times: {seconds['cold']}"
    )


def _home(name: str) -> str:
    return PEERS[name].environment


if __name__ == "__main__":
    main()
