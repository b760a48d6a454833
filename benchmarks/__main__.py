"""``python -m benchmarks``: Calotype beside its peers on this machine. Prints a table, writes ``results/``.

Environments of the peers, checkpoints and bundles are made in ``.work`` the first time: an hour, and 20 GB of disk.
A pair that has been measured on this processor is kept; ``--again`` measures it anew.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import speed
from benchmarks.checkpoints import MODELS, model
from benchmarks.environments import WORK
from benchmarks.machine import results
from benchmarks.peers import CALOTYPE, PEERS


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="talbot")
    parser.add_argument("--size", type=int, help="pixels of a side; default: the model's own")
    parser.add_argument(
        "--steps", type=int, default=speed.STEPS, help="whose timesteps are whole numbers: 2, 4, 10, 28; default: 4"
    )
    parser.add_argument("--images", type=int, default=1, help="in a call; default: 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=[name for name in PEERS if name != CALOTYPE], metavar="PEER")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    arguments = parser.parse_args()
    chosen = model(arguments.model, WORK / "benchmarks")
    plan = speed.Plan(
        model=chosen,
        size=arguments.size or chosen.size,
        steps=arguments.steps,
        images=arguments.images,
        rounds=arguments.rounds,
    )
    path = results(plan.name)
    for peer in arguments.peers or PEERS:
        if peer == CALOTYPE or chosen.name not in PEERS[peer].models:
            continue
        if arguments.again or not speed.measured(path, peer):
            speed.merge(path, peer, speed.compare(plan, peer, WORK), plan)
        print(speed.line(path, peer), flush=True)
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
