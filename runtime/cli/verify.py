"""``calotype verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from calotype.runtime.bundle.parity import Figures

if TYPE_CHECKING:
    from calotype.runtime.bundle.manifest import Manifest


@click.command("verify")
@click.argument("bundle", default="talbot")
@click.option("--against", metavar="SOURCE", help="Compare with the PyTorch modules of this checkpoint too.")
@click.option("--backend", default="cpu", show_default=True, help="Run the graphs here.")
@click.option("--sha256", metavar="PIN", help="Fail unless this is the manifest's sha256, which calotype info shows.")
def command(bundle: str, against: str | None, backend: str, sha256: str | None) -> None:
    """Check that BUNDLE is what its manifest says, and that its graphs compute what they should.

    Every file is compared with its sha256, and every network with its float32 graph on the CPU. So are the plans and
    engines that were built of it, weights and all.
    """
    from calotype.runtime.bundle.folder import Bundle
    from calotype.runtime.diagnostics.verification import verify_graphs
    from calotype.runtime.errors import MissingPackageError

    opened = Bundle.open(bundle, sha256=sha256)
    click.echo(f"{opened.path}: {len(opened.manifest.files)} files are intact")
    _check_plans(opened.manifest)
    for what, figures in verify_graphs(opened, backend):
        _show(what, figures)
    if against is None:
        return
    try:
        from calotype.export.verification import verify_against
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "torch", "export") from error
    for what, figures in verify_against(opened, against):
        _show(what, figures)


def _check_plans(manifest: Manifest) -> None:
    """Every plan of the bundle that the cache has, with the weights that are not read where it is opened."""
    from calotype.runtime.sessions.plans import describe_plan, plans_of

    built = plans_of(manifest)
    for path in built:
        describe_plan(path)
    if built:
        click.echo(f"{built[0].parent}: {len(built)} plans of it are intact")


def _show(what: str, figures: Figures) -> None:
    click.echo(f"{what}: relative error {figures.max_relative:.1e}, cosine {figures.min_cosine:.7f}")
