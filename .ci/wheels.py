"""For which machines the package index has wheels of all that an extra needs: ``make wheels`` prints the table.

uv resolves for another platform and another Python without installing anything. The packages of TensorRT and
TensorRT-RTX are sources that only name two others, their bindings and their libraries: those are what is asked for.
"""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("cpu", "cuda", "tensorrt", "tensorrt-lean", "tensorrt-rtx", "control", "export", "hub", "plans", "serve")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# By glibc: that of JetPack 5, JetPack 6 and JetPack 7.
PLATFORMS = {"2.31": "aarch64-manylinux_2_31", "2.35": "aarch64-manylinux_2_35", "2.39": "aarch64-manylinux_2_39"}
META = ("tensorrt-cu13", "tensorrt-lean-cu13", "tensorrt-rtx")


def needed(extra: str) -> list[str]:
    """What the extra asks for, with that in place of sources which only name others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for line in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        name = line.partition(">")[0]
        parts = f"{name.removesuffix('-cu13')}-cu13"
        found += [f"{parts}-bindings", f"{parts}-libs"] if name in META else [line]
    return found


def missing(extra: str, platform: str, python: str) -> str | None:
    """The first package without a wheel; None where all have one."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--only-binary", ":all:", "--python-version", python]
    ran = subprocess.run(
        [*command, "--python-platform", platform, "-"], input="\n".join(needed(extra)), capture_output=True, text=True
    )
    if ran.returncode == 0:
        return None
    lines = [line for line in ran.stderr.replace("cause: ", "\n").splitlines() if "wheels" in line]
    words = lines[0].replace("all versions of ", "").split() if lines else ["?"]
    return next((word for word in words if word[0].islower() and "-" in word), " ".join(words[:6]))


def main() -> None:
    """Print the table."""
    print(f"`make wheels`, {dt.date.today():%d %B %Y}:\n")
    print(f"| extra | {' | '.join(f'aarch64, glibc {name}' for name in PLATFORMS)} |")
    print(f"|---|{'---|' * len(PLATFORMS)}")
    for extra in sys.argv[1:] or EXTRAS:
        cells = []
        for platform in PLATFORMS.values():
            found = {python: missing(extra, platform, python) for python in PYTHONS}
            good = [python for python, package in found.items() if package is None]
            lacking = sorted({package for package in found.values() if package is not None})
            cells.append((", ".join(good) or "none") + (f" (lacks {', '.join(lacking)})" if lacking else ""))
        print(f"| `{extra}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
