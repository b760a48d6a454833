"""``calotype bench``: a bundle on this machine, or with ``--url`` a server under load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
MOST_BYTES, MOST_KEY = 10_000_000, 4096
POSITIVE = click.FloatRange(0, min_open=True)


@click.command("bench")
@click.argument("bundle", required=False)
@click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, tensorrt-rtx, cuda or cpu.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    multiple=True,
    help="Denoising steps; with --url it may be repeated, and each is as frequent.  [default: the model's]",
)
@click.option(
    "--size", "sizes", type=int, multiple=True, help="Pixels of a side; may be repeated.  [default: the model's]"
)
@click.option(
    "--images",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 2, 4, 8),
    show_default=True,
    help="Pictures in a call; may be repeated.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Runs that a median is taken of.")
@click.option("--url", help="Put load on this server instead, such as http://127.0.0.1:8000; BUNDLE is a name there.")
@click.option("--rate", type=POSITIVE, default=1.0, show_default=True, help="Requests a second, on average.")
@click.option("--duration", type=POSITIVE, default=30.0, show_default=True, help="Seconds in which requests arrive.")
@click.option("--slo", type=POSITIVE, help="Seconds within which an answer is good.")
@click.option("--prompt", help="The prompt of every request.  [default: a red apple, noto style]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed is the same traffic.")
@click.option("--api-key-file", type=FILE, help="A file that holds the server's key and nothing else.")
@click.option("--compare", type=FILE, help="Print how the figures stand to those that --json wrote earlier.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(url: str | None, compare: Path | None, as_json: bool, **options: Any) -> None:
    """Measure BUNDLE here: seconds per picture and step, cold start, memory, and the host's share of a step.

    With --url, send requests to a server that speaks OpenAI's images API, at random times that do not wait for its
    answers, and measure how long they take from the time at which each was due.
    """
    old = None if compare is None else _read(compare)
    report, text = _bundle(options) if url is None else _server(url, options)
    if as_json:
        click.echo(json.dumps(report))
    elif old is None:
        click.echo(text)
    if old is not None:
        from calotype.runtime.diagnostics.benchmark import table
        from calotype.runtime.diagnostics.load import compared

        rows = compared(report, old)
        click.echo(table(rows) if rows else "the two reports have no figure in common", err=as_json)


def _key(path: Path) -> str:
    """The key in a file; raises BadParameter where it is none."""
    from calotype.runtime.untrusted import read_bytes, why

    try:
        return read_bytes(path, MOST_KEY).decode("ascii").strip()
    except UnicodeDecodeError:
        reason = "it is no text in ASCII"
    except OSError as error:
        reason = why(error)
    raise click.BadParameter(f"{path} cannot be read: {reason}", param_hint="--api-key-file")


def _read(path: Path) -> Any:
    """A report that ``--json`` wrote; raises BadParameter where it is none."""
    from calotype.runtime.untrusted import parse_json, read_bytes, why

    try:
        return parse_json(read_bytes(path, MOST_BYTES))
    except (OSError, ValueError) as error:
        message = f"{path} is no report ({why(error)}); give what calotype bench --json printed"
        raise click.BadParameter(message, param_hint="--compare") from error


def _bundle(options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Measure a bundle on this machine; the figures, and as text."""
    from calotype.runtime.bundle.folder import Bundle
    from calotype.runtime.diagnostics import benchmark
    from calotype.runtime.diagnostics.doctor import machine
    from calotype.runtime.pipeline import Pipeline

    if len(options["steps"]) > 1:
        raise click.BadParameter("is given once, unless load is put on a --url", param_hint="--steps")
    steps = options["steps"][0] if options["steps"] else None
    opened = Bundle.open(options["bundle"] or "talbot")
    report: dict[str, Any] = {"machine": machine(), "model": opened.manifest.name}
    with Pipeline.load(opened.path, options["backend"]) as pipeline:
        report["backend"] = pipeline.backend
        rounds = options["rounds"]
        report["latency"] = [
            {"pixels": size, **benchmark.latency(pipeline, images=images, height=size, steps=steps, rounds=rounds)}
            for size in options["sizes"] or (opened.manifest.defaults.height,)
            for images in options["batches"]
        ]
    report["cold_start"] = [
        {"disk_cache": state, **benchmark.cold_start(opened, report["backend"], cached=state == "warm", steps=steps)}
        for state in ("cold", "warm")
    ]
    report["size_mb"] = round(sum(record.size for record in opened.manifest.files.values()) / 1e6, 1)
    report["host"] = [
        {"latents": f"{side}x{side}x4", "jobs": jobs, **benchmark.host_overhead(side, jobs=jobs)}
        for side in (64, 128)
        for jobs in (1, 8)
    ]
    titles = {
        "latency": "Time",
        "cold_start": "From the start of a process to a picture on disk",
        "host": "The host's share of a guided step, a UNet that answers at once",
    }
    head = f"{report['model']} on {report['backend']}, {report['size_mb']} MB on disk"
    return report, "\n\n".join([head, *(f"{title}\n{benchmark.table(report[key])}" for key, title in titles.items())])


def _server(url: str, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Put load on a server; the figures, and as text."""
    from calotype.runtime.diagnostics import load
    from calotype.runtime.diagnostics.benchmark import table

    if len(options["sizes"]) > 1:
        raise click.BadParameter("is given once with --url", param_hint="--size")
    path = options["api_key_file"]
    size = f"{options['sizes'][0]}x{options['sizes'][0]}" if options["sizes"] else None
    traffic = load.Traffic(
        rate=options["rate"],
        duration=options["duration"],
        steps=tuple(options["steps"]) or (None,),
        size=size,
        model=options["bundle"],
        prompt=options["prompt"] or load.PROMPT,
        seed=options["seed"],
        slo=options["slo"],
    )
    report = load.report(load.offer(url, traffic, None if path is None else _key(path)), traffic)
    parts = [f"{url}, {traffic.rate:g} requests a second for {traffic.duration:g} s", table(report["groups"])]
    if report["refused"]:
        parts.append(f"Not drawn\n{table(report['refused'])}")
    return report, "\n\n".join(parts)
