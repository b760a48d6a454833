"""The report's sections on servers under load and on a server that runs for long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.serving.servers import SERVERS
from benchmarks.tables import origin, table


def serving(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Latencies by load, server and number of steps."""
    rows = []
    for point in report["points"]:
        for group in point["groups"]:
            seconds = (f"{group[key]:.2f} s" for key in ("p50_s", "p95_s", "p99_s"))
            whose = [f"{point['load']:g}", SERVERS[point["server"]].title, group["requests"], str(group["sent"])]
            rows.append([*whose, *seconds, f"{group['goodput']:.2f}"])
    traffic = report["points"][0]["traffic"]
    others = " to ".join(f"{pick(point['machine']['load'] for point in report['points']):g}" for pick in (min, max))
    about = (
        f"{origin(name, report)} talbot at {traffic['size']} pixels, {' or '.join(map(str, traffic['steps']))} steps a "
        "request, as often each; Poisson arrivals, latency from the time at which a request was due. A load of 1 is "
        "what one request at a time can carry. Goodput: pictures a second within "
        f"{traffic['slo']:.1f} s. The machine had other work, at a lower priority: its load was {others}."
    )
    heads = ["load", "server", "requests", "sent", "p50", "p95", "p99", "goodput"]
    return f"## Servers under load\n\n{about}\n\n{table(heads, rows)}\n"


def soak(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """What came of a server's requests, and whether its memory grew."""
    outcomes = "; ".join(f"{what}: {count}" for what, count in report["outcomes"].items())
    held, opened = report["memory_mb"], report["descriptors"]
    title = "A server that leaks on purpose" if "leak" in name else "A server under mixed traffic for long"
    return (
        f"## {title}\n\n{origin(name, report)} {outcomes}. Memory of all its processes that is not pages of files: "
        f"{held['first']} MB a quarter of the way, {held['last']} MB at the end, "
        f"{report['memory_percent_an_hour']:+g}% an hour; open files {opened['first']} and {opened['last']}. "
        f"The machine had other work, at a lower priority: its load was {report['machine']['load']}.\n"
    )
