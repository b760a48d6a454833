"""``python -m benchmarks.report``: all files in ``results/`` as one page with plots; the same files, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.machine import RESULTS
from benchmarks.peers import PEERS
from benchmarks.report_forms import host, micro, modes
from benchmarks.report_serving import serving, soak
from benchmarks.report_simulation import simulation
from benchmarks.tables import origin, spread_text, table

PLOTTED = 4  # peers, and more; fewer are seen as well in the table

HEAD = """# Measured

Made by `python -m benchmarks.report` from the files in [results](results), each of which says command, commit and
machine. Ratios are of two programs that took turns within minutes on the same weights, prompt, noise and schedule;
"times" above 1 means that Calotype is faster. PSNR compares the last picture with Calotype's.

`make bench` installs what the benchmarks need, and `.venv/bin/python` runs them; each of them takes `--help`.

"""
TAIL = """
A *picture* is one image, and a *call* makes one or more of them. A *step* is a denoising step of a picture. A *row* is
one entry of a network's input along its first axis: a guided picture takes two in the UNet at each step. A *form* is
one way to compute the same, a *mode* one way to draw nearly the same; forms take turns in *rounds*, each of which runs
every form once, and in brackets stands the time over that of the first form, as its median (and least to most).

Kept is the newest of each subject and machine. What was measured before lies in the history, as it was at commit
6d9d5b1: other figures of the same GPU, of the host's time, and of `--fast` while it took half the steps. Results of
before then have been brought into the shape that is written now; where their ranges were not kept, medians stand alone.
"""


# What is run, what it measures, and the options of a first look that takes a minute or two.
COMMANDS = (
    ("benchmarks.micro", "the small benchmarks: lists them, `NAME` runs one", "attention --rounds 1 --every 2"),
    ("benchmarks.host", "the host's own time in a denoising step", ""),
    ("benchmarks.schedulers", "a scheduler's step", "--rounds 5"),
    ("benchmarks.startup", "fresh processes", "--rounds 1"),
    ("benchmarks.export", "an export's time and memory; `sd1` and `sdxl` take minutes and gigabytes", "talbot"),
    ("benchmarks.quality", "how good talbot is", "--every 40"),
    (
        "benchmarks.quality.modes",
        "what ways to draw give and cost that are not exact: `fast`, `int8`, `shortcuts`",
        "fast --every 70 --modes fast",
    ),
    (
        "benchmarks",
        "peers beside Calotype; the first time their environments are made, gigabytes",
        "--peers calotype-unbuilt --rounds 1",
    ),
    ("benchmarks.cold", "cold starts beside peers", "--peers calotype-unbuilt --rounds 1"),
    ("benchmarks.control", "steps with ControlNets and a T2I-Adapter, beside diffusers", "--rounds 1"),
    ("benchmarks.ip_adapter", "steps with image prompts, beside diffusers", "--rounds 1"),
    ("benchmarks.lora", "LoRAs switched per call, beside diffusers", "--model talbot --size 128 --rounds 1"),
    (
        "benchmarks.gpu",
        "everything that a GPU shows",
        "talbot --backend cpu --rounds 1 --steps 1 --images 1 --repeats 1",
    ),
    ("benchmarks.serving_simulation", "the server's batcher in simulated time", "--pictures 100"),
    ("benchmarks.report", "writes this page from the results", ""),
)


def commands() -> str:
    """A table of them."""
    heads = ["measures", "", "first look"]
    rows = [[about, f"`python -m {name}`", f"`{look}`" if look else ""] for name, about, look in COMMANDS]
    return table(heads, rows)


def main() -> None:
    """Write."""
    write(RESULTS, RESULTS.parent)


def write(results: Path, folder: Path) -> None:
    """Turn the files in ``results`` into ``README.md`` and ``plots/`` in ``folder``."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    parts = [f"{HEAD}{commands()}\n{TAIL}"]
    for name, report in files.items():
        for kind, section in SECTIONS.items():
            if name.startswith(kind):
                parts.append(section(name, report, folder))
                break
        else:
            if "gpu" in report:  # its files are named after the GPU
                parts.append(gpu(name, report, folder))
                continue
            raise SystemExit(f"{name}.json is of no kind that is known here; known: {', '.join(SECTIONS)}")
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def speed(name: str, report: Mapping[str, Any], folder: Path) -> str:
    """Peers beside Calotype."""
    measured = {peer: pair for peer, pair in report["pairs"].items() if "ratio" in pair}
    rows = [
        [
            PEERS[peer].title + ("" if PEERS[peer].exact else " (not float32)"),
            f"{spread_text(pair['ratio'])} times",
            f"{pair['peer']['picture_s']['median']:.3g} s / {pair['calotype']['picture_s']['median']:.3g} s",
            f"{pair['peer']['step_s']['median']:.3g} s / {pair['calotype']['step_s']['median']:.3g} s",
            f"{pair['peer']['peak_mb']['resident']} MB / {pair['calotype']['peak_mb']['resident']} MB",
            f"{pair['peer']['peak_mb']['anonymous']} MB / {pair['calotype']['peak_mb']['anonymous']} MB",
            f"{sum(pair['peer']['load_s'].values()):.1f} s / {sum(pair['calotype']['load_s'].values()):.1f} s",
            "the same picture" if pair["psnr_db"] is None else f"{pair['psnr_db']} dB",
        ]
        for peer, pair in measured.items()
    ]
    heads = [
        "peer",
        "its time over Calotype's",
        "a picture",
        "a step",
        "most memory",
        "not of files",
        "import and load",
        "pictures",
    ]
    missing = [
        f"- {PEERS[peer].title}: {pair['not_run']}" for peer, pair in report["pairs"].items() if "ratio" not in pair
    ]
    if len(measured) >= PLOTTED:
        _plot(folder / "plots" / f"{name}.svg", measured)
    about = (
        f"{report['size']}x{report['size']} pixels, {report['images']} picture(s), {report['steps']} steps with "
        f"guidance, {_about(report)} Pairs are peer / Calotype; a range is the least and the most of the rounds. "
        "Memory counts pages of mapped files, which the system can drop, and then without them."
    )
    lines = [
        f"## {report['model']}, beside peers",
        "",
        about,
        "",
        *([f"![{name}](plots/{name}.svg)", ""] if len(measured) >= PLOTTED else []),
        table(heads, rows),
    ]
    return "\n".join([*lines, *(["", "Not run:", "", *missing] if missing else []), ""])


OPENING = ("imports", "load")
SWITCHES = ("first_s", "first_processor_s", "again_s")


def cold(_name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """From the start of a process to a picture, beside peers."""
    rows = []
    for peer, pair in report["pairs"].items():
        if "not_run" in pair:
            continue
        sides = (pair["peer"], pair["calotype"])
        rows.append(
            [
                PEERS[peer].title,
                *(
                    text
                    for kind in ("warm", "cold")
                    for text in (
                        f"{spread_text(pair[f'ratio_{kind}'])} times",
                        " / ".join(f"{side[kind]['total']['median']:.2f} s" for side in sides),
                        " / ".join(f"{sum(side[kind][part]['median'] for part in OPENING):.2f} s" for side in sides),
                    )
                ),
                " / ".join(f"{side['installed_mb']} MB" for side in sides),
            ]
        )
    seconds = ["to the picture", "of which until the model is open"]
    heads = ["peer", "its start over Calotype's", *seconds, "nothing cached", *seconds, "installed"]
    about = (
        f"From the start of a process to its first picture, {report['size']}x{report['size']}, {report['steps']} "
        f"steps; {_about(report)} Pairs are peer / Calotype. "
        "With nothing cached, model and packages were dropped from the system's cache before each start."
    )
    return f"## {report['model']}, cold start beside peers\n\n{about}\n\n{table(heads, rows)}\n"


def lora(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Switching LoRAs, beside diffusers."""
    rows = [
        [
            side,
            *(f"{item[key]['median']:.3g} s ({item[key]['min']:.3g} to {item[key]['max']:.3g})" for key in SWITCHES),
            f"{item['step_without_s']['median']:.3g} s",
            f"{item['step_with_s']['median']:.3g} s, {spread_text(item['step_ratio'])} times",
        ]
        for side, item in ((side, report[side]) for side in ("calotype", "diffusers"))
    ]
    over = report["over_diffusers"]
    rows.append(
        ["times diffusers'", *(spread_text(over[key]) for key in SWITCHES), "", spread_text(over["step_with_s"])]
    )
    about = (
        f"{origin(name, report)} Rank {report['rank']}, {report['size']}x{report['size']} pixels, {report['rounds']} "
        f"rounds in turns, load {report['machine']['load']} at their end. Calotype's kept sets held "
        f"{report['kept_mb']} MB then; both together had grown by {report['grown_mb']} MB of their own."
    )
    heads = ["", "a new file", "of a processor", "back to one that was used", "a guided step without", "with one"]
    return f"## {report['model']}, LoRAs switched\n\n{about}\n\n{table(heads, rows)}\n"


# By case of the benchmarks of control and of image prompts, what it is.
CONDITIONED = {
    "without": "without",
    "over": "with inputs for control, all of them zeros",
    "one": "a ControlNet",
    "two": "two ControlNets",
    "adapter": "a T2I-Adapter",
    "plain": "an IP-Adapter, 4 tokens",
    "plus": "an IP-Adapter Plus, 16 tokens",
    "both": "both",
}


def control(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Steps with control, beside diffusers."""
    return _conditioned("control", name, report)


def image_prompts(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Steps with image prompts, beside diffusers."""
    return _conditioned("image prompts", name, report)


def _conditioned(what: str, name: str, report: Mapping[str, Any]) -> str:
    rows = []
    for stage in report["stages"].values():
        for case, item in stage["cases"].items():
            times = (f"{item[side]['step_s']['median']:.3g} s" for side in ("calotype", "diffusers"))
            rows.append([CONDITIONED[case], *times, f"{spread_text(item['times'])} times"])
    memory = "; ".join(
        f"{stage}: {', '.join(f'{side} {own} MB' for side, own in item['own_mb'].items())}"
        for stage, item in report["stages"].items()
    )
    about = (
        f"{origin(name, report)} {report['size']}x{report['size']} pixels, a guided step, {report['rounds']} rounds in "
        f"turns, load {report['machine']['load']} at their end. Memory of their own, without pages of files, {memory}."
    )
    heads = ["", "Calotype", "diffusers", "Calotype is faster"]
    return f"## {report['model']}, {what}\n\n{about}\n\n{table(heads, rows)}\n"


def _found(item: Mapping[str, Any], split: str) -> str:
    change = item["top5_change"][split]
    return f"{item[f'{split}_top5']}% ({change['mean']:+.1f} ± {change['error']:.1f})"


def schedulers(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Microseconds of a step."""
    rows = [
        [solver, f"{item['step_us']} µs", f"{item['drawn_us']} µs"]
        for solver, item in report.items()
        if isinstance(item, dict) and "step_us" in item
    ]
    return f"## A scheduler's step\n\n{origin(name, report)}\n\n{table(['', 'step', 'with drawn noise'], rows)}\n"


def startup(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Seconds of fresh processes."""
    rows = [[what, _seconds(item)] for what, item in report.items() if isinstance(item, dict) and "median_s" in item]
    rows.append(["installed", f"{report['site_packages_mb']} MB"])
    return f"## A fresh process\n\n{origin(name, report)}\n\n{table(['', 'median (least to most)'], rows)}\n"


def export(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """What an export takes."""
    rows = [[key.replace("_", " "), f"{report[key]}"] for key in ("seconds", "cpu_seconds", "peak_resident_gb")]
    load = report["machine"]["load_before_and_after"]
    about = f"{origin(name, report)} Load before and after: {load[0]} and {load[1]}; resident counts mapped files."
    return f"## Exporting {name.split('-')[1]}\n\n{about}\n\n{table(['', ''], rows)}\n"


def quality(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """How good talbot is."""
    judged = {key: item for key, item in report.items() if isinstance(item, dict) and key not in ("machine", "pairs")}
    keys = list(dict.fromkeys(key for item in judged.values() for key in item))
    rows = [[key.replace("_", " "), *(f"{item.get(key, '')}" for item in judged.values())] for key in keys]
    about = f"{origin(name, report)} Autoencoder {report['autoencoder_psnr_db']} dB, {report['steps']} steps; per cent."
    return f"## Quality of talbot\n\n{about}\n\n{table(['', *judged], rows)}\n"


def gpu(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Every model on every backend of one GPU, and what did not run or failed there."""
    rows, lines = [], []
    for model, backends in report["models"].items():
        for backend, record in backends.items():
            for part, value in record.items():
                reason = value if part == "not_run" else isinstance(value, dict) and _reason(value)
                lines += [f"- {model}, {backend}, {part.replace('_', ' ')}: {reason}"] if reason else []
            rows += _gpu_rows(model, backend, record)
    heads = [
        "",
        "",
        "milliseconds",
        "a step",
        "host's share",
        "GPU memory",
        "worst cosine",
        "picture against the CPU's",
    ]
    about = (
        f"`{report['command']}`, driver {report['driver']}; [figures](results/{name}.json). "
        "A row is a picture, and for PyTorch the UNet call of a guided step."
    )
    parts = [f"## {report['gpu']['name']}, {report['date']}", "", about, "", table(heads, rows), ""]
    return "\n".join([*parts, *([*lines, ""] if lines else [])])


def _reason(value: Mapping[str, Any]) -> str | None:
    return value.get("not_run") or value.get("failed")


def _gpu_rows(model: str, backend: str, record: Mapping[str, Any]) -> list[list[str]]:
    if "pixels" in record.get("ready", {}):
        model += f", {record['ready']['pixels']} pixels"
    calls = {part: value for part, value in record.items() if isinstance(value, dict) and "call_ms" in value}
    rows = [
        [model, f"PyTorch, {part}", f"{value['call_ms']['median']}", "", "", f"{value['gpu_memory_mib']} MiB", "", ""]
        for part, value in calls.items()
    ]
    rows += [
        [model, f"diffusers, {part}", _beside(value), *[""] * 4, _distance(value)]
        for part, value in record.items()
        if isinstance(value, dict) and "ratio" in value
    ]
    pictures, parity = record.get("pictures", {}), record.get("picture_parity", {})
    if "picture_ms" not in pictures:
        return rows
    cosines = [value["min_cosine"] for value in record.get("parity", {}).values() if isinstance(value, dict)]
    numbers = [
        f"{pictures['picture_ms']['median']} ({pictures['steps']} steps)",
        f"{pictures['step_ms']}",
        f"{pictures['host_us_per_step']} µs",
        f"{pictures['gpu_memory_mib']} MiB",
        f"{min(cosines):.6f}" if cosines else "not compared",
        _distance(parity) if "psnr_db" in parity else "not compared",
    ]
    return [*rows, [model, backend, *numbers]]


def _beside(figures: Mapping[str, Any]) -> str:
    return f"{figures['picture_ms']['diffusers']}, {figures['ratio']['median']} times Calotype's"


def _distance(figures: Mapping[str, Any]) -> str:
    return "the same" if figures["psnr_db"] is None else f"{figures['psnr_db']} dB"


SECTIONS = {
    "speed-": speed,
    "cold-": cold,
    "lora-": lora,
    "control-": control,
    "ip_adapter-": image_prompts,
    "micro-": micro,
    "modes-": modes,
    "host-": host,
    "startup-": startup,
    "schedulers-": schedulers,
    "export-": export,
    "quality-": quality,
    "simulation-serving-": simulation,
    "serving-": serving,
    "soak-": soak,
}


def _plot(path: Path, measured: Mapping[str, Any]) -> None:
    """A bar for each peer: its time over Calotype's, with the range of the rounds."""
    mpl.rcParams["svg.hashsalt"], mpl.rcParams["svg.fonttype"] = path.stem, "none"
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.45 * len(measured)), layout="constrained")
    ordered = sorted(measured.items(), key=lambda item: -item[1]["ratio"]["median"])
    for row, (peer, pair) in enumerate(ordered):
        ratio = pair["ratio"]
        error = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
        colour = "tab:blue" if PEERS[peer].exact else "0.65"
        axes.barh(row, ratio["median"], xerr=error, color=colour, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(ordered)), [PEERS[peer].title for peer, _ in ordered])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time over Calotype's (grey: not float32)")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _about(report: Mapping[str, Any]) -> str:
    """Where pairs were measured."""
    first = next(iter(report["pairs"].values()))
    commits = ", ".join(sorted({pair["commit"] for pair in report["pairs"].values()}))
    machine = first["machine"]
    return (
        f"{first['rounds']} rounds; {machine['processor']}, {machine['cores']} cores, {first['date']}, "
        f"commit {commits}."
    )


def _seconds(value: Mapping[str, float]) -> str:
    return f"{value['median_s']} s ({value['min_s']} to {value['max_s']})"


if __name__ == "__main__":
    main()
