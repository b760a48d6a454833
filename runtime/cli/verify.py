"""``calotype verify``."""

from __future__ import annotations

import click


@click.command("verify")
@click.argument("bundle", default="talbot")
def command(bundle: str) -> None:
    """Check that every file of BUNDLE is what its manifest says."""
    from calotype.runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    click.echo(f"{opened.path}: {len(opened.manifest.files)} files are intact")
