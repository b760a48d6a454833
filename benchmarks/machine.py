"""Where figures come from (machine, versions, commit, command), and the files that they are kept in."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
WRITINGS = (":(exclude,glob)**/*.md", ":(exclude)benchmarks/results", ":(exclude)benchmarks/plots")  # change no figure


def origin(command: str, *sources: str) -> dict[str, Any]:
    """What every file of results says of itself; ``sources`` are the paths whose last commit counts, by default all."""
    return {"command": command, "date": dt.datetime.now(dt.UTC).date().isoformat(), "commit": commit(*sources)}


def results(name: str) -> Path:
    """The file of results ``name`` of this processor: pairs of two processors never share one."""
    return RESULTS / f"{name}-{slug(_processor().partition(',')[0])}.json"


def slug(model: str) -> str:
    """A processor's or GPU's name for files: ``Intel(R) Xeon(R) Processor`` is ``intel-xeon``."""
    bare = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b.*", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", bare).strip("-")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and what else was running."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),  # that this process may use, and what it starts
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the whole file of results, or leave the one that is there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def commit(*sources: str) -> str:
    """The last that changed ``sources``, marked where a file that figures depend on differs from it.

    Where ``BENCHMARK_COMMIT`` names one, it is that: a copy on a borrowed machine has no history, or one of its own.
    """
    told = os.environ.get("BENCHMARK_COMMIT")
    if told:
        return told
    last = _git("log", "-1", "--format=%h", "--", *sources)
    return f"{last}-dirty" if _git("status", "--porcelain", "--", *sources, *WRITINGS) else last


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    wide = any(line.startswith("flags") and "avx512f" in line for line in lines)
    return (models[0] if models else platform.machine()) + (", AVX-512" if wide else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
