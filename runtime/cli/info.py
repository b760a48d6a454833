"""``calotype info``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("info")
@click.argument("target", default="talbot")
@click.option("--json", "as_json", is_flag=True, help="Print a bundle's manifest, or a picture's settings, as JSON.")
def command(target: str, as_json: bool) -> None:
    """Show TARGET: a bundle (a bundled model's name or a folder), or a picture file."""
    from calotype.runtime.bundle import BUNDLED, Bundle
    from calotype.runtime.images import FORMATS, read_parameters

    path = Path(target)
    if path.suffix.lower() in FORMATS and not (BUNDLED / target).is_dir():
        text = read_parameters(path)
        click.echo(json.dumps({"parameters": text}, ensure_ascii=False) if as_json else text)
        return
    manifest = Bundle.open(target).manifest
    if as_json:
        click.echo(manifest.dumps(), nl=False)
        return
    total = sum(record.size for record in manifest.files.values())
    defaults = manifest.defaults
    lines = {
        "name": manifest.name,
        "family": manifest.family,
        "weights": f"{manifest.precision}, {total / 2**20:.1f} MiB in {len(manifest.files)} files",
        "networks": ", ".join(manifest.networks),
        "defaults": f"{defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}",
        "scheduler": str(defaults.scheduler or manifest.scheduler.get("_class_name")),
        "licence": manifest.license or "not stated",
    }
    for name, value in lines.items():
        click.echo(f"{name + ':':<11}{value}")
    for source in manifest.attribution:
        click.echo(f"           {source}")
    for network, variants in manifest.parity.items():
        for precision, figures in variants.items():
            click.echo(
                f"parity:    {network} {precision} against PyTorch: relative error {figures['max_relative']:.1e}, "
                f"cosine {figures['min_cosine']:.7f}"
            )
