"""``calotype build``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from calotype.runtime.cli.precision import Precision
from calotype.runtime.errors import MissingPackageError


@click.command("build")
@click.argument("bundle", required=False)
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx", "cpu"]), help="What builds and runs them.")
@click.option("--batch", help="UNet rows, two a guided picture: ROWS or MIN:OPT:MAX.  [default: 1:2:8]")
@click.option("--height", help="Pixels: SIZE or MIN:OPT:MAX, as 512:512:1024.  [default: around the model's own]")
@click.option("--width", help="Likewise.")
@click.option("--profile", "extra", multiple=True, help="One more: NAME,batch=…,height=…,width=…; may be repeated.")
@click.option("--static", is_flag=True, help="One guided picture of one size: fastest, and least memory.")
@click.option(
    "--precision",
    type=Precision(["float16", "float32", "int8"]),
    help="What it computes in; int8, on the CPU, is the UNet alone.  [default: float16 where there is such a graph]",
)
@click.option(
    "--network",
    "networks",
    multiple=True,
    help="This one alone; may be repeated. unet_deep and unet_shallow are built only when they are named: generate "
    "--cache-interval takes them.",
)
@click.option("--version-compatible", is_flag=True, help="Later versions of TensorRT and its lean runtime run them.")
@click.option("--hardware-compatible", is_flag=True, help="GPUs of the same compute capability run them too.")
@click.option(
    "--for",
    "targets",
    metavar="LIST",
    help="The GPUs that one plan is for, by compute capability, as sm86,sm89,sm120. TensorRT-RTX needs none of them "
    "here; TensorRT needs one.  [default: TensorRT-RTX's own choice; TensorRT: the GPU of this machine]",
)
@click.option("--strip-weights", is_flag=True, help="Leave weights out: models of one architecture share plans.")
@click.option("--force", is_flag=True, help="Build what the cache has, too.")
@click.option("--list", "as_list", is_flag=True, help="List the plans of the cache, and stop.")
@click.option("--clean", is_flag=True, help="Remove the plans of the cache, and stop.")
def command(
    bundle: str | None,
    backend: str | None,
    batch: str | None,
    height: str | None,
    width: str | None,
    extra: tuple[str, ...],
    static: bool,
    precision: str | None,
    networks: tuple[str, ...],
    version_compatible: bool,
    hardware_compatible: bool,
    targets: str | None,
    strip_weights: bool,
    force: bool,
    as_list: bool,
    clean: bool,
) -> None:
    """Turn the graphs of BUNDLE into plans, and keep them for generate to run.

    For the CPU: engines of ONNX Runtime for this processor, which open at once and take every size.
    """
    if as_list or clean:
        _tend(clean)
        return
    if bundle is None or backend is None:
        raise click.UsageError("BUNDLE and --backend are needed; or --list, or --clean")
    if backend == "cpu":
        _refuse_for_cpu(click.get_current_context())
        paths = _build_for_cpu(bundle, networks, precision, force)
    else:
        sizes = {"batch": batch, "height": height, "width": width, "extra": extra, "static": static}
        paths = _build_for_gpu(
            bundle,
            backend,
            networks,
            sizes,
            precision=precision,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            targets=targets,
            strip_weights=strip_weights,
            force=force,
        )
    for path in paths.values():
        click.echo(str(path))


def _build_for_cpu(bundle: str, networks: tuple[str, ...], precision: str | None, force: bool) -> dict[str, Path]:
    """Engines by network."""
    with _needing_onnx():
        from calotype.engine.cpu import build_engines
    from calotype.runtime.bundle.folder import Bundle

    return build_engines(
        Bundle.open(bundle), networks=networks or None, precision=precision or "float32", force=force, say=_say
    )


def _build_for_gpu(
    bundle: str, backend: str, networks: tuple[str, ...], sizes: dict[str, Any], targets: str | None, **options: Any
) -> dict[str, Path]:
    """Plans by network, for the profiles of ``sizes``."""
    with _needing_onnx():
        from calotype.engine.build import Options, build_bundle
    from calotype.engine.profiles import choose_profiles
    from calotype.engine.targets import parse_targets
    from calotype.runtime.bundle.folder import Bundle

    opened = Bundle.open(bundle)
    return build_bundle(
        opened,
        backend=backend,
        profiles=choose_profiles(opened.manifest, **sizes),
        options=Options(**options, targets=() if targets is None else parse_targets(targets)),
        networks=networks or None,
        say=_say,
        progress=_show if sys.stderr.isatty() else None,
    )


@contextlib.contextmanager
def _needing_onnx() -> Iterator[None]:
    """Raise MissingPackageError where what is imported inside is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "onnx", "export") from error


def _refuse_for_cpu(context: click.Context) -> None:
    """What an engine of the CPU has no use for: it takes every size, and runs here alone."""
    useful = {"bundle", "backend", "precision", "networks", "force", "as_list", "clean"}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in useful and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} is for plans of a GPU; an engine of the CPU takes every size and "
                "serves this processor: leave it out"
            )


def _say(line: str) -> None:
    click.echo(_line(line), err=True)


def _line(text: str) -> str:
    """Over what :func:`_show` left in the line."""
    return f"\r\x1b[K{text}" if sys.stderr.isatty() else text


def _show(phase: str, part: float) -> None:
    click.echo(_line(f"{part:4.0%} {phase}"), nl=False, err=True)


def _tend(clean: bool) -> None:
    from calotype.runtime.sessions.plans import list_plans, plan_trouble, read_record, target_of

    if clean:
        from calotype.engine.cache import clean_plans

        click.echo(f"{clean_plans() / 2**20:.1f} MiB freed")
        return
    for path in list_plans():
        record, trouble = read_record(path), plan_trouble(path)
        if record is None or trouble is not None:
            click.echo(f"{path}  {trouble}")
            continue
        key = record.key
        size = (record.size + (0 if record.weights is None else record.weights.size)) / 2**20
        named = ", ".join(profile["name"] for profile in key.get("profiles", ()))
        profiles = f", profiles {named}" if named else ""
        click.echo(f"{path}  {size:.1f} MiB, {key['precision']}, for {target_of(key)}{profiles}")
