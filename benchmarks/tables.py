"""What every section of the report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def origin(name: str, report: Mapping[str, Any]) -> str:
    """Where a file's figures come from, with a link to it."""
    machine = report["machine"]
    return f"`{report['command']}`, commit {report['commit']}, {machine['processor']}; [figures](results/{name}.json)."


def spread_text(value: Mapping[str, float]) -> str:
    """A median with its range."""
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
