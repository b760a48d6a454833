"""``calotype export``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from calotype.runtime.cli.precision import Precision

# What the exporter calls it, and with it the files of a bundle.
WEIGHTS = {"float16": "fp16", "float32": "fp32"}


@click.command("export")
@click.argument("source")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=Precision(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the weights. float16 makes graphs that compute in float16 and in float32, float32 the latter alone.",
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
@click.option("--ema", is_flag=True, help="Take the averaged weights of a single file that carries both.")
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="What the UNet predicts, where the checkpoint does not say it or is wrong.",
)
@click.option("--variant", metavar="NAME", help="Which of a folder's weights, where it has several: bf16, non_ema, …")
@click.option(
    "--image-encoder",
    type=click.Path(path_type=Path),
    help="The folder of an IP-Adapter's image encoder.  [default: image_encoder beside its file]",
)
@click.option("--safety-checker", is_flag=True, help="Take the checkpoint's own safety checker along, too.")
@click.option(
    "--transformer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file whose transformer takes the place of that in the folder SOURCE, as those of FLUX.2 klein are shared.",
)
def command(
    source: str,
    bundle: Path,
    precision: str,
    force: bool,
    ema: bool,
    prediction_type: str | None,
    variant: str | None,
    image_encoder: Path | None,
    safety_checker: bool,
    transformer: Path | None,
) -> None:
    """Turn the checkpoint SOURCE into BUNDLE.

    SOURCE is a folder in diffusers' layout, an original .safetensors or .ckpt file, or a repository of the Hugging Face
    Hub (owner/name, with @revision or without). An export that was interrupted goes on after the last component it
    finished when it is called again.
    """
    from calotype.runtime.errors import MissingPackageError

    try:
        from calotype.export.bundle import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "torch", "export") from error
    manifest = export_checkpoint(
        source,
        bundle,
        precision=WEIGHTS[precision],
        force=force,
        ema=ema,
        prediction_type=prediction_type,
        variant=variant,
        image_encoder=image_encoder,
        safety_checker=safety_checker,
        transformer=transformer,
        progress=_show,
    )
    click.echo(f"{bundle}: {manifest.name}, {len(manifest.networks)} networks")


def _show(component: str, what: str, part: float) -> None:
    """A bar for each component on stderr; plain lines where that is no terminal."""
    if sys.stderr.isatty():
        bar = "#" * round(part * 20)
        click.echo(f"\r{component:<15} [{bar:<20}] {what:<40}", nl=part == 1, err=True)
    else:
        click.echo(f"{component}: {what}", err=True)
