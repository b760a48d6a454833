"""The report's sections on small benchmarks, modes of drawing and the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables import origin, spread_text, table

# By the small benchmark: its title, and a sentence about it.
MICRO = {
    "attention": ("Attention as one node or in parts", "Processor time. More in [a note](attention.md)."),
    "attention-gpu": ("Attention", "The time of one attention among eight in a row."),
    "attention-plans": (
        "Attention, memory of plans that were built without a GPU",
        "Eight attentions in a row in float16. More in [a note](attention.md).",
    ),
    "caching": ("A step with and without its deep part", ""),
    "convolutions": (
        "A convolution with fewer products",
        "Random numbers; off is from float64, over the largest value. Engines take 4 x 4 for kernels of 256 to 640 x "
        "1280 channels, 2 x 2 for larger ones above a UNet's deepest level.",
    ),
    "fusions": (
        "Operators put together",
        "The results have the kernels of the first and the last, too. Off is of the norm; a repeated run without any "
        "is as much off from itself.",
    ),
    "growth": ("By pixels, steps and pictures", ""),
    "int8-operators": ("A UNet in int8: operators", "Random numbers; off is of the root mean square."),
    "int8-step": ("A UNet in int8: a step", "Random weights; own memory leaves out the pages of mapped files."),
    "limit": ("Of the machine's limit", "The fraction is the network's rate over the matrix product's."),
    "shortcuts": ("Shortcuts in attention: time", "In ONNX Runtime on the CPU, random weights."),
}


# What is said of a whole measurement.
FACTS: dict[str, Callable[[Any], str]] = {
    "library": lambda value: f"{value}.",
    "build_s": lambda value: f"Built in {value} s.",
    "off": lambda value: f"It is {value}.",
}


def micro(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """A small benchmark: a line for each row, or for each form where there is one row."""
    title, about = MICRO[report["measurement"]]
    title += f", {report['variant']}" if "variant" in report else ""
    title += f" on {report['gpu']['name']}" if "gpu" in report else ""
    rounds = f" {report['rounds']} rounds in turns; times are medians." if "rounds" in report else ""
    facts = [say(report[key]) for key, say in FACTS.items() if key in report]
    forms = list(dict.fromkeys(form for row in report["rows"] for form in row["forms"]))
    if len(report["rows"]) == 1:
        (row,) = report["rows"]
        made = table([row["title"], ""], [[form, _form(own)] for form, own in row["forms"].items()])
    else:
        lines = [[row["title"], *(_form(row["forms"].get(form, {})) for form in forms)] for row in report["rows"]]
        made = table(["", *forms], lines)
    text = " ".join(part for part in (f"{origin(name, report)}{rounds}", *facts, about) if part)
    return f"## {title}\n\n{text}\n\n{made}\n"


# What is said of a form, and how; what is not here is left to the file of results.
SAID: dict[str, Callable[[Any], str]] = {
    "failed": str,
    "ms": lambda value: _milliseconds(value["median"]),
    "mib": lambda value: f"{value} MiB",
    "ratio": lambda value: f"({_some(value)} times)",
    "fraction": lambda value: f"fraction {_some(value)}",
    "giga_operations": lambda value: f"{value}·10⁹ operations",
    "giga_per_second": lambda value: f"{value['median']}·10⁹ a second",
    "off": lambda value: f"off {value:.1e}" if value else "",
    "own_mb": lambda value: f"{value} MB its own",
    "resident_mb": lambda value: f"{value} MB resident",
}


def _form(figures: Mapping[str, Any]) -> str:
    said = [say(figures[key]) for key, say in SAID.items() if key in figures]
    return ", ".join(text for text in said if text).replace(", (", " (")


def _milliseconds(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.4g} s"
    return f"{value:.4g} ms" if value >= 1 else f"{1000 * value:.4g} µs"


def _some(value: Mapping[str, float]) -> str:
    """A ratio with its range, where that was kept."""
    return spread_text(value) if "min" in value else f"{value['median']:.2f}"


MODES = {
    "fast": ("talbot, nearly the same picture for less", "More in [a note](fast.md)."),
    "int8": ("A UNet in int8: talbot", ""),
    "shortcuts": ("Shortcuts in attention: quality", "More in [a note](fast.md#shortcuts-in-attention)."),
}


def modes(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Ways to draw that are not exact."""
    title, about = MODES[name.split("-")[1]]
    title += f", {report['seeds']} seeds" if report["seeds"] > 1 else ""
    heads = ["mode", "PSNR, dB", "of nine in ten", "distance", "operations", "time", "seen, top 5", "held out, top 5"]
    rows = [
        [
            mode,
            *(_given(item.get(key)) for key in ("psnr_db", "psnr_tenth_db", "distance", "operations", "time")),
            *(_found(item, split) for split in ("seen", "held_out")),
        ]
        for mode, item in report["modes"].items()
    ]
    text = (
        f"{origin(name, report)} {report['prompts']} prompts, {report['seeds']} seed(s), {report['steps']} steps. "
        "Operations and time are the exact picture's over the mode's. In brackets: points more than exact pictures, "
        f"± standard error. {about}"
    ).rstrip()
    return f"## {title}\n\n{text}\n\n{table(heads, rows)}\n"


def _given(value: float | None) -> str:
    return "" if value is None else f"{value}"


def _found(item: Mapping[str, Any], split: str) -> str:
    found = f"{item[f'{split}_top5']}%"
    change = item.get("top5_change", {}).get(split)
    if change is None or change["error"] is None or item["psnr_db"] is None:
        return found
    return f"{found} ({change['mean']:+.1f} ± {change['error']:.1f})"


def host(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """The host's own time in a step."""
    rows = [
        [
            case,
            *(f"{item['step_us'][key]} µs" for key in ("median", "min", "p90", "p99")),
            f"{report['aims']['step_us'][case]} µs",
            f"{item['peak_bytes']}",
        ]
        for case, item in report["cases"].items()
    ]
    size = "x".join(str(length) for length in report["latents"])
    heads = ["", "median of a step", "least", "nine in ten", "99 in 100", "aim", "bytes allocated at most"]
    text = f"{origin(name, report)} Latents of {size}; the UNet computes nothing; {report['steps']} steps."
    return f"## The host's own time\n\n{text}\n\n{table(heads, rows)}\n"
