"""``calotype export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True, help="Of the weights."
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
def command(source: Path, bundle: Path, precision: str, force: bool) -> None:
    """Turn the checkpoint SOURCE, a folder in diffusers' layout, into BUNDLE."""
    from calotype.runtime.errors import MissingPackageError

    try:
        from calotype.export.bundle import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "torch", "export") from error
    manifest = export_checkpoint(
        source, bundle, precision=precision, force=force, progress=lambda what: click.echo(what, err=True)
    )
    click.echo(f"{bundle}: {manifest.name}, {len(manifest.networks)} networks")
