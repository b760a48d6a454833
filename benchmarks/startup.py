"""Cold figures: ``python -m benchmarks.startup``. Each is the median of runs that take turns, as JSON.

A fresh process each time: ``calotype --help``, and ``calotype generate`` with the bundled model to a PNG on disk,
beside a bare interpreter as the floor. The size is that of the site-packages of the environment it runs in.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine, origin

ROUNDS = 7


def main() -> None:
    """Measure, print."""
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "picture.png")
        calotype = [sys.executable, "-m", "calotype.runtime"]
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "help": [*calotype, "--help"],
            "generate": [*calotype, "generate", "a red apple, noto style", "-o", picture, "--seed", "0", "--overwrite"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
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
    about = {**origin("python -m benchmarks.startup"), "machine": machine()}
    print(json.dumps({**about, "site_packages_mb": round(size / 1e6, 1), **report}, indent=2))


if __name__ == "__main__":
    main()
