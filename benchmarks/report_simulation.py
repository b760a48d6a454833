"""The report's section on the simulated server, and its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.tables import origin, table

STYLES = {
    "one at a time": {"color": "0.6", "linestyle": "--"},
    "one at a time, shortest first": {"color": "0.6"},
    "whole requests": {"color": "tab:orange", "linestyle": "--"},
    "whole requests, shortest first": {"color": "tab:orange"},
    "steps": {"color": "tab:blue", "linewidth": 2.5},
}
SHOWN = "5"  # the SLO whose curves are plotted


def simulation(name: str, report: Mapping[str, Any], folder: Path) -> str:
    """Goodput by traffic, SLO and policy."""
    plots = folder / "plots"
    _goodputs(plots / f"{name}.png", report)
    _curves(plots / f"{name}-in-time.png", report)
    times = report["times"]
    about = (
        f"{origin(name, report)} **This is a simulation**: step times are {times['model']}'s on {times['gpu']}, "
        f"arrivals are drawn, {report['pictures']} pictures a point. Goodput: the largest load at which 95 of 100 "
        "pictures are finished within so many times their lone latency, in units of what one picture at a time can "
        "carry. *Told*: that time is the deadline of the request, and the server knows it. Every policy gives up what "
        "can no longer meet its deadline."
    )
    assumes = "\n".join(f"- {line}" for line in report["assumes"])
    parts = [f"## A server's policies on {times['gpu']}, simulated", about, f"It assumes:\n\n{assumes}"]
    parts += [f"![Goodput](plots/{name}.png)", f"![In time](plots/{name}-in-time.png)"]
    policies = list(STYLES)
    for told, title in (("goodput_told", "told"), ("goodput_not_told", "not told")):
        rows = [
            [mix, f"{slo} times", *(f"{goodputs[policy]:.2f}" for policy in policies)]
            for mix, found in report["mixes"].items()
            for slo, goodputs in found[told].items()
        ]
        parts.append(table([f"pictures of, {title}", "within", *policies], rows))
    return "\n\n".join(parts) + "\n"


def _goodputs(path: Path, report: Mapping[str, Any]) -> None:
    """A panel for each traffic: goodput by SLO, deadlines told."""
    figure, panels = plt.subplots(2, 2, figsize=(8, 6), layout="constrained", sharex=True, sharey=True)
    for axes, (mix, found) in zip(panels.flat, report["mixes"].items(), strict=True):
        goodputs = found["goodput_told"]
        slos = [int(slo) for slo in goodputs]
        for policy, style in STYLES.items():
            axes.plot(slos, [goodputs[str(slo)][policy] for slo in slos], marker="o", label=policy, **style)
        axes.set_xscale("log")
        axes.set_xticks(slos, [f"{slo}" for slo in slos])
        axes.minorticks_off()
        axes.set_ylim(0, max(report["loads"]) + 0.05)
        axes.set_title(mix, fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel("allowed latency, in lone latencies", fontsize=9)
    figure.supylabel("goodput (1: what one at a time can carry)", fontsize=9)
    _save(figure, panels, path)


def _curves(path: Path, report: Mapping[str, Any]) -> None:
    """A panel for each traffic: pictures in time by load."""
    figure, panels = plt.subplots(2, 2, figsize=(8, 6), layout="constrained", sharex=True, sharey=True)
    for axes, (mix, found) in zip(panels.flat, report["mixes"].items(), strict=True):
        for policy, style in STYLES.items():
            values = [100 * float(value) for value in found["in_time"][SHOWN][policy].split()]
            axes.plot(report["loads"][: len(values)], values, label=policy, **style)
        axes.axhline(100 * report["wanted"], color="black", linewidth=0.6)
        axes.set_ylim(50, 101)
        axes.set_title(mix, fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel("load (1: what one at a time can carry)", fontsize=9)
    figure.supylabel(f"% finished within {SHOWN} lone latencies", fontsize=9)
    _save(figure, panels, path)


def _save(figure: Any, panels: Any, path: Path) -> None:
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
