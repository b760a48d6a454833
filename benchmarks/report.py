"""``python -m benchmarks.report``: all files in ``results/`` as one page with plots; the same files, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.machine import RESULTS
from benchmarks.peers import PEERS

HEAD = """# Measured

Made by `python -m benchmarks.report` from the files in [results](results), each of which says command, commit and
machine. Ratios are of two programs that took turns within minutes on the same weights, prompt, noise and schedule;
"times" above 1 means that Calotype is faster. PSNR compares the last picture with Calotype's.
"""


def main() -> None:
    """Write."""
    write(RESULTS, RESULTS.parent)


def write(results: Path, folder: Path) -> None:
    """Turn the files in ``results`` into ``README.md`` and ``plots/`` in ``folder``."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    parts = [HEAD]
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
            f"{_range(pair['ratio'])} times",
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
        f"![{name}](plots/{name}.svg)",
        "",
        _table(heads, rows),
    ]
    return "\n".join([*lines, *(["", "Not run:", "", *missing] if missing else []), ""])


OPENING = ("imports", "load")


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
                        f"{_range(pair[f'ratio_{kind}'])} times",
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
    return f"## {report['model']}, cold start beside peers\n\n{about}\n\n{_table(heads, rows)}\n"


def limit(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Operations a second beside those of a matrix product."""
    rows = [
        [
            key.replace(" ", ", ") + " pixels",
            f"{item['giga_operations']}",
            f"{item['giga_per_second']['median']} / {item['limit_giga_per_second']['median']}",
            _range(item["fraction"]),
        ]
        for key, item in report.items()
        if isinstance(item, dict) and "fraction" in item
    ]
    heads = ["", "operations, 10⁹", "10⁹ a second: network / matrix product", "fraction"]
    return f"## {name.partition('-')[2]}, of the machine's limit\n\n{_origin(name, report)}\n\n{_table(heads, rows)}\n"


def growth(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Time over pixels, steps and batch."""
    rows = [
        [f"{row['size']}", f"{row['steps']}", f"{row['images']}", f"{row['call_s']['median']} s", _range(row["ratio"])]
        for row in report["rows"]
    ]
    host = [
        [row["latents"], f"{row['jobs']}", f"{row['step_us']:.0f} µs", f"{row['allocated_bytes']}"]
        for row in report["host"]
    ]
    return (
        f"## {name.partition('-')[2]}, by pixels, steps and pictures\n\n{_origin(name, report)}\n\n"
        f"{_table(['pixels of a side', 'steps', 'pictures', 'a call', 'over the first row'], rows)}\n\n"
        "The host's own share of a guided step, with an engine that answers at once:\n\n"
        f"{_table(['latents', 'jobs', 'a step', 'bytes allocated'], host)}\n"
    )


def fast(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Modes that do less."""
    rows = [
        [mode, f"{item['psnr_db']} dB", f"{item['operations']}"]
        for mode, item in report["modes"].items()
        if item["psnr_db"] is not None and "operations" in item
    ]
    heads = ["mode", "PSNR to the exact picture", "times fewer operations"]
    about = f"{_origin(name, report)} {report['prompts']} prompts, {report['steps']} steps. More in [a note](fast.md)."
    return f"## {name.split('-')[1]}, nearly the same picture for less\n\n{about}\n\n{_table(heads, rows)}\n"


def int8(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Pictures of an engine in int8, or its time and memory."""
    if "modes" in report:
        rows = [
            [
                mode,
                *(f"{item[key]}" for key in ("psnr_db", "psnr_tenth_db", "distance")),
                *(_found(item, split) for split in ("seen", "held_out")),
            ]
            for mode, item in report["modes"].items()
            if item["psnr_db"] is not None
        ]
        heads = ["talbot", "PSNR, dB", "of the worst tenth", "distance", "found, trained on", "found, held out"]
        exact = report["modes"]["exact"]
        about = (
            f"{report['prompts']} prompts, {report['seeds']} seeds, {report['steps']} steps; exact pictures are found "
            f"in {exact['seen_top5']}% and {exact['held_out_top5']}%. In brackets: points more, ± standard error."
        )
    elif "operators" in report:
        ways = list(dict.fromkeys(way for own in report["operators"].values() for way in own))
        rows = [
            [what, *(f"{own[way]['ms']} ms, {100 * own[way]['off']:.1f}%" if way in own else "" for way in ways)]
            for what, own in report["operators"].items()
        ]
        heads = ["milliseconds, and how far off", *ways]
        about = f"Random numbers, {report['rounds']} rounds. The load was {report['machine']['load']}."
    else:
        rows = [
            [
                f"{size}x{size}",
                *(f"{item['step_s'][precision]} s" for precision in ("float32", "int8")),
                f"{_range(item['ratio'])} times",
                *(
                    f"{item['memory_mb'][precision][which]} MB"
                    for precision in ("float32", "int8")
                    for which in ("own", "resident")
                ),
            ]
            for size, item in report["sizes"].items()
        ]
        heads = ["a guided step", "float32", "int8", "the one over the other"]
        heads += [f"{what} in {how}" for how in ("float32", "int8") for what in ("own memory", "with mapped files")]
        about = (
            f"SD 1.5-sized UNet, random weights, {report['rounds']} rounds; built in {report['build_s']} s, "
            f"{report['off']}. The load was {report['machine']['load']}."
        )
    what = name.removeprefix("int8-").partition("-cpu")[0].replace("-", ", ", 1).replace("-", " ")
    return f"## A UNet in int8: {what}\n\n{_origin(name, report)} {about}\n\n{_table(heads, rows)}\n"


def _found(item: Mapping[str, Any], split: str) -> str:
    change = item["top5_change"][split]
    return f"{item[f'{split}_top5']}% ({change['mean']:+.1f} ± {change['error']:.1f})"


def convolutions(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Milliseconds of a 3 x 3 convolution, and how far off."""
    forms = list(next(iter(report["rows"].values())))
    rows = [
        [
            what,
            *(f"{own[form]['ms']} ms, {own[form]['off']:.1e}" for form in forms),
            *(str(own[form]["times_faster"]) for form in forms[1:]),
        ]
        for what, own in report["rows"].items()
    ]
    heads = ["SD 1.5", *forms, *(f"{form}, times faster" for form in forms[1:])]
    return (
        f"## A convolution with fewer products\n\n{_origin(name, report)} {report['rounds']} rounds; random numbers; "
        "off from float64, over the largest value. Engines take 4 x 4 for kernels of 256 to 640 x 1280 channels, 2 x 2 "
        f"for larger ones above a UNet's deepest level.\n\n{_table(heads, rows)}\n"
    )


def schedulers(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Microseconds of a step."""
    rows = [
        [solver, f"{item['step_us']} µs", f"{item['drawn_us']} µs"]
        for solver, item in report.items()
        if isinstance(item, dict) and "step_us" in item
    ]
    return f"## A scheduler's step\n\n{_origin(name, report)}\n\n{_table(['', 'step', 'with drawn noise'], rows)}\n"


def startup(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """Seconds of fresh processes."""
    rows = [[what, _seconds(item)] for what, item in report.items() if isinstance(item, dict) and "median_s" in item]
    rows.append(["installed", f"{report['site_packages_mb']} MB"])
    return f"## A fresh process\n\n{_origin(name, report)}\n\n{_table(['', 'median (least to most)'], rows)}\n"


def attention(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """One node or its parts; on a GPU, every form."""
    if "gpu" in report:
        forms = list(dict.fromkeys(form for row in report["rows"] for form in row["forms"] if form != "failed"))
        rows = [[row["attention"], *(_attention_us(row["forms"], form) for form in forms)] for row in report["rows"]]
        about = f"`{report['command']}`, commit {report['commit']}; [figures](results/{name}.json). Of one attention."
        title = f"Attention, {report['backend']} on {report['gpu']['name']}"
        return f"## {title}\n\n{about}\n\n{_table(['', *forms], rows)}\n"
    rows = [
        [row["attention"], *(f"{row['median_processor_ms'][form]} ms" for form in ("Attention", "parts"))]
        for row in report["rows"]
    ]
    return (
        f"## Attention as one node or in parts\n\n{_origin(name, report)} More in [a note](attention.md).\n\n"
        f"{_table(['', 'one node', 'parts'], rows)}\n"
    )


def _attention_us(forms: Mapping[str, Any], form: str) -> str:
    own = forms.get(form, forms)
    return f"{own['median_us']} µs" if "median_us" in own else own.get("failed", "")


def fusions(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """What pays in a UNet on a GPU."""
    rows = [
        [
            variant,
            f"{item['median_ms']} ms" if "median_ms" in item else item.get("failed", ""),
            f"{item.get('ratio', '')}",
            f"{item.get('off', '')}",
            f"{item['seconds'][1]} s" if "seconds" in item else "",
        ]
        for variant, item in report["variants"].items()
    ]
    heads = ["put together", "a guided step's UNet", "over none", "off from none", "first run"]
    about = (
        f"`{report['command']}`, commit {report['commit']}; [figures](results/{name}.json), with the kernels of the "
        "first and the last. Off is of the norm; a repeated run without any is as much off from itself."
    )
    title = f"Operators put together, {report['model']} on {report['gpu']['name']}"
    return f"## {title}\n\n{about}\n\n{_table(heads, rows)}\n"


def export(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """What an export takes."""
    rows = [[key.replace("_", " "), f"{report[key]}"] for key in ("seconds", "cpu_seconds", "peak_resident_gb")]
    load = report["machine"]["load_before_and_after"]
    about = f"{_origin(name, report)} Load before and after: {load[0]} and {load[1]}; resident counts mapped files."
    return f"## Exporting {name.split('-')[1]}\n\n{about}\n\n{_table(['', ''], rows)}\n"


def quality(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """How good talbot is."""
    judged = {key: item for key, item in report.items() if isinstance(item, dict) and key not in ("machine", "pairs")}
    keys = list(dict.fromkeys(key for item in judged.values() for key in item))
    rows = [[key.replace("_", " "), *(f"{item.get(key, '')}" for item in judged.values())] for key in keys]
    about = (
        f"{_origin(name, report)} Autoencoder {report['autoencoder_psnr_db']} dB, {report['steps']} steps; per cent."
    )
    return f"## Quality of talbot\n\n{about}\n\n{_table(['', *judged], rows)}\n"


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
    parts = [f"## {report['gpu']['name']}, {report['date']}", "", about, "", _table(heads, rows), ""]
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


def attention_shortcuts(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """What is lost with what is left out of attention, or the time of a step without it."""
    title = "Shortcuts in attention"
    if "modes" not in report:
        rows = [[form, f"{item['median']} ({item['min']} to {item['max']})"] for form, item in report["ratio"].items()]
        about = f"{_origin(name, report)} A guided step of Stable Diffusion 1.5 at 256 pixels in ONNX Runtime."
        return f"## {title}: time\n\n{about}\n\n{_table(['', 'of the whole step'], rows)}\n"
    keys = {"psnr_db": "PSNR, dB", "psnr_tenth_db": "of nine in ten", "distance": "distance of features"}
    keys |= {"seen_top5": "seen, top 5", "held_out_top5": "held out, top 5"}
    rows = [
        [mode, *(f"{item[key] if item[key] is not None else ''}" for key in keys)]
        for mode, item in report["modes"].items()
    ]
    about = f"{_origin(name, report)} Talbot, {report['prompts']} prompts, {report['steps']} steps."
    return f"## {title}: quality\n\n{about}\n\n{_table(['', *keys.values()], rows)}\n"


def attention_plans(name: str, report: Mapping[str, Any], _folder: Path) -> str:
    """What plans of each form will take of a GPU's memory."""
    forms = list(report["rows"][0]["activations"])
    rows = [
        [row["attention"], _mib(row["logits"]), *(_mib(row["activations"][form]) for form in forms)]
        for row in report["rows"]
    ]
    about = f"{_origin(name, report)} {report['library']}, float16, eight in a row. More in [a note](attention.md)."
    table = _table(["", "logits of one", *forms], rows)
    return f"## Attention, memory of plans that were built without a GPU\n\n{about}\n\n{table}\n"


def _mib(value: int | str) -> str:
    return f"{value / 2**20:.1f} MiB" if isinstance(value, int) else value


SECTIONS = {
    "speed-": speed,
    "cold-": cold,
    "limit-": limit,
    "growth-": growth,
    "fast-": fast,
    "int8-": int8,
    "convolutions-": convolutions,
    "startup-": startup,
    "schedulers-": schedulers,
    "attention-plans-": attention_plans,
    "attention-shortcuts-": attention_shortcuts,
    "attention-": attention,
    "fusions-": fusions,
    "export-": export,
    "quality-": quality,
}


def _plot(path: Path, measured: Mapping[str, Any]) -> None:
    """A bar for each peer: its time over Calotype's, with the range of the rounds."""
    mpl.rcParams["svg.hashsalt"] = path.stem
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


def _origin(name: str, report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    return f"`{report['command']}`, commit {report['commit']}, {machine['processor']}; [figures](results/{name}.json)."


def _range(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _seconds(value: Mapping[str, float]) -> str:
    return f"{value['median_s']} s ({value['min_s']} to {value['max_s']})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
