"""The time of fresh processes: ``python -m benchmarks.startup``. Medians of runs that take turns, as JSON.

A fresh process each time: ``calotype --help``, and ``calotype generate`` with the bundled model to a PNG on disk,
beside a bare interpreter as the floor. The size is that of the site-packages of the environment it runs in.
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
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import machine, origin
from benchmarks.timing import in_turns
from calotype.runtime.version import __version__


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
            "generate": [*calotype, "generate", "a red apple, noto style", "-o", picture, "--seed", "0", "--overwrite"],
        }
        run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        calls = {name: functools.partial(run, command) for name, command in commands.items()}
        seconds, _ = in_turns(calls, rounds, warm_up=0)
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
    print(json.dumps({**about, "site_packages_mb": round(size / 1e6, 1), **report}, indent=2))


if __name__ == "__main__":
    main()
