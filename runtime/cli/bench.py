"""``calotype bench``."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("bench")
@click.argument("bundle", default="talbot")
@click.option("--backend", default="auto", show_default=True, help="auto, tensorrt, tensorrt-rtx, cuda or cpu.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the model's]")
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
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    bundle: str,
    backend: str,
    steps: int | None,
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    rounds: int,
    as_json: bool,
) -> None:
    """Measure BUNDLE here: seconds per picture and step, cold start, memory, and the host's share of a step."""
    from calotype.runtime.bundle.folder import Bundle
    from calotype.runtime.diagnostics import benchmark
    from calotype.runtime.diagnostics.doctor import machine
    from calotype.runtime.pipeline import Pipeline

    opened = Bundle.open(bundle)
    report: dict[str, Any] = {"machine": machine(), "model": opened.manifest.name}
    with Pipeline.load(opened.path, backend) as pipeline:
        report["backend"] = pipeline.backend
        report["latency"] = [
            {"pixels": size, **benchmark.latency(pipeline, images=images, height=size, steps=steps, rounds=rounds)}
            for size in sizes or (opened.manifest.defaults.height,)
            for images in batches
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
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"{report['model']} on {report['backend']}, {report['size_mb']} MB on disk")
    for title, rows in (
        ("Time", report["latency"]),
        ("From the start of a process to a picture on disk", report["cold_start"]),
        ("The host's share of a guided step, a UNet that answers at once", report["host"]),
    ):
        click.echo(f"\n{title}\n{benchmark.table(rows)}")
