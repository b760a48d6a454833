"""``calotype export``."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("export")
@click.argument("source")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Of the weights. fp16 makes graphs that compute in float16 and in float32, fp32 the latter alone.",
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
def command(source: str, bundle: Path, precision: str, force: bool) -> None:
    """Turn the checkpoint SOURCE, a folder in diffusers' layout, into BUNDLE.

    An export that was interrupted goes on where it stopped when it is called again.
    """
    from calotype.runtime.errors import MissingPackageError

    try:
        from calotype.export.bundle import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "torch", "export") from error
    manifest = export_checkpoint(source, bundle, precision=precision, force=force, progress=_show)
    click.echo(f"{bundle}: {manifest.name}, {len(manifest.networks)} networks")


def _show(component: str, what: str, part: float) -> None:
    """A bar for each component on stderr; plain lines where that is no terminal."""
    if sys.stderr.isatty():
        bar = "#" * round(part * 20)
        click.echo(f"\r{component:<15} [{bar:<20}] {what:<40}", nl=part == 1, err=True)
    else:
        click.echo(f"{component}: {what}", err=True)
