"""The time of fresh processes: ``python -m benchmarks.startup``. Medians of runs that take turns, as JSON.

A fresh process each time: ``calotype --help``, and ``calotype generate`` with the bundled model to a PNG on disk,
beside a bare interpreter as the floor, and what it does in parts: from the start of the process to the first line of
Python, the imports, opening the model, the prompt, 20 steps, the decoder, the file. The size is that of the
site-packages of the environment it runs in, and of each package in it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine, origin
from benchmarks.timing import in_turns
from calotype.runtime.version import __version__

PARTS = """
import sys, time
begin = [time.time()]
from calotype import Pipeline
import calotype.runtime.pipeline
begin.append(time.time())
with Pipeline.load("talbot", "cpu") as pipeline:
    begin.append(time.time())
    output = pipeline("a red apple, noto style", seed=0, num_inference_steps=20)
    begin.append(time.time())
    output.pictures[0].save(sys.argv[2], overwrite=True)
    begin.append(time.time())
timings = output.timings
print(begin[0] - float(sys.argv[1]), *(after - before for before, after in zip(begin, begin[1:])))
print(timings.text_encoder, timings.denoising, timings.vae_decoder)
"""
NAMES = ("interpreter", "imports", "open", "draw", "save", "text_encoder", "steps", "vae_decoder")


def parts(rounds: int, picture: str) -> dict[str, float]:
    """Medians of the seconds of each part of a fresh process that draws; ``draw`` has the last three in it."""
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-c", PARTS, str(time.time()), picture]
        found.append([float(word) for word in subprocess.run(command, check=True, capture_output=True).stdout.split()])
    return {
        name: round(statistics.median(values), 3) for name, values in zip(NAMES, zip(*found, strict=True), strict=True)
    }


def sizes(packages: Path) -> dict[str, float]:
    """Megabytes of what lies in the folder of packages, the largest first; what is below one is left out."""
    found = {}
    for place in packages.iterdir():
        files = [path for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
        found[place.name] = sum(path.stat().st_size for path in files if not path.is_symlink()) / 1e6
    return {name: round(size, 1) for name, size in sorted(found.items(), key=lambda item: -item[1]) if size >= 1}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    rounds = parser.parse_args(arguments).rounds
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "picture.png")
        calotype = [sys.executable, "-m", "calotype.runtime"]
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "help": [*calotype, "--help"],
            "import": [sys.executable, "-c", "import calotype"],
            "generate": [*calotype, "generate", "a red apple, noto style", "-o", picture, "--seed", "0", "--overwrite"],
        }
        run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        calls = {name: functools.partial(run, command) for name, command in commands.items()}
        seconds, _ = in_turns(calls, rounds, warm_up=0)
        by_part = parts(rounds, picture)
    packages = Path(sysconfig.get_paths()["purelib"])
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    report = {
        name: {
            "median_s": round(statistics.median(values), 3),
            "min_s": round(min(values), 3),
            "max_s": round(max(values), 3),
        }
        for name, values in seconds.items()
    }
    about = {
        **origin(f"python -m benchmarks.startup --rounds {rounds}"),
        "machine": machine() | {"calotype": __version__},
        "rounds": rounds,
    }
    print(
        json.dumps(
            {
                **about,
                "site_packages_mb": round(size / 1e6, 1),
                "packages_mb": sizes(packages),
                **report,
                "parts_s": by_part,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
