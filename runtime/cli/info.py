"""``calotype info``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calotype.runtime.cli.terminal import show
from calotype.runtime.errors import MissingPackageError

if TYPE_CHECKING:
    from calotype.runtime.bundle.folder import Bundle
    from calotype.runtime.sessions.records import PlanRecord


@click.command("info")
@click.argument("target", default="talbot")
@click.option("--json", "as_json", is_flag=True, help="Print a manifest, a plan's record or a picture's settings so.")
@click.option("--device", metavar="SIZE", help="Say which ways to run a bundle fit a GPU with that memory, as 6GB.")
def command(target: str, as_json: bool, device: str | None) -> None:
    """Show TARGET: a bundle (a bundled model's name or a folder), a picture file, or a plan."""
    from calotype.runtime.bundle.folder import BUNDLED, Bundle
    from calotype.runtime.pictures.opening import SUFFIXES

    path = Path(target)
    if path.suffix.lower() in SUFFIXES and not path.is_dir() and not (BUNDLED / target).is_dir():
        _show_picture(path, as_json)
        return
    if path.suffix == ".plan":
        _show_plan(path, as_json)
        return
    bundle = Bundle.open(target)
    manifest = bundle.manifest
    if device is not None:
        _show_ways(bundle, device)
        return
    if as_json:
        show(json.dumps(manifest.to_json() | {"sha256": manifest.sha256}, indent=2, ensure_ascii=False))
        return
    total = sum(record.size for record in manifest.files.values())
    defaults = manifest.defaults
    lines = {
        "name": manifest.name,
        "kind": manifest.kind or "",
        "family": manifest.family,
        "weights": f"{manifest.precision}, {total / 2**20:.1f} MiB in {len(manifest.files)} files",
        "networks": ", ".join(manifest.networks),
        "defaults": f"{defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}",
        "scheduler": str(defaults.scheduler or manifest.scheduler.get("_class_name")),
        "licence": manifest.license or "not stated",
        "sha256": manifest.sha256,
    }
    for name, value in lines.items():
        show(f"{name + ':':<11}{value}")
    for source in manifest.attribution:
        show(f"           {source}")
    _show_memory(bundle)
    for network, variants in manifest.parity.items():
        for precision, figures in variants.items():
            show(
                f"parity:    {network} {precision} against PyTorch: relative error {figures['max_relative']:.1e}, "
                f"cosine {figures['min_cosine']:.7f}"
            )


def _show_picture(path: Path, as_json: bool) -> None:
    from calotype.runtime.pictures.embedded import Graph, read_settings
    from calotype.runtime.pictures.parameters import parse_parameters

    found = read_settings(path)
    if isinstance(found, Graph):
        kinds = ", ".join(dict.fromkeys(found.nodes))
        nodes = f"a graph of ComfyUI with {len(found.nodes)} nodes: {kinds}; Calotype does not run graphs"
        show(json.dumps({"comfyui": json.loads(found.text)}, ensure_ascii=False) if as_json else nodes)
    elif as_json:
        settings = dataclasses.asdict(parse_parameters(found))
        show(json.dumps({"parameters": found, "settings": settings}, ensure_ascii=False))
    else:
        show(found)


def _show_memory(bundle: Bundle) -> None:
    """Of a GPU, network by network, and at once with --low-memory and without."""
    from calotype.runtime.diagnostics.memory import most, needs

    found = needs(bundle)
    for need in found:
        known = "" if need.activations is None else f", activations {_mib(need.activations)} in the largest plan here"
        show(f"memory:    {need.network} {need.precision}: weights {_mib(need.weights)}{known}")
    unknown = [need.network for need in found if need.activations is None]
    also = f", and the activations of {', '.join(unknown)}, which their plans state once they are built"
    show(
        f"at once:   {_mib(most(found, low_memory=True))} with --low-memory, {_mib(most(found, low_memory=False))} "
        f"without{also if unknown else ''}"
    )


def _show_ways(bundle: Bundle, device: str) -> None:
    """What fits, for one guided picture of the model's own size."""
    try:
        from calotype.engine.fitting import DRIVER, parse_size, ways
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "onnx", "export") from error
    room, defaults = parse_size(device), bundle.manifest.defaults
    show(
        f"{_mib(room)} for one guided picture of {defaults.width}x{defaults.height}; activations are estimated, and "
        f"{_mib(DRIVER)} are the driver's and the library's"
    )
    found = ways(bundle)
    for way in found:
        words = ", ".join([way.precision, *way.options])
        show(f"{'fits:' if way.size <= room else 'too large:':<11}{_mib(way.size):>12}  {words}")
    if all(way.size > room for way in found):
        show("nothing fits: use smaller pictures with --height and --width, or the CPU")


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _show_plan(path: Path, as_json: bool) -> None:
    from calotype.runtime.sessions.plans import describe_plan, target_of

    record = describe_plan(path)
    if as_json:
        show(json.dumps(dataclasses.asdict(record)))
        return
    if record.key["backend"] == "cpu":
        _show_engine(record)
        return
    key, figures = record.key, record.figures
    compatible = [what for what in ("version", "hardware") if key[f"{what}_compatible"]]
    lines = {
        "network": f"{key['network']} of {key['bundle']}, {key['precision']}",
        "built by": f"{key['backend']} {key['version']} in {_figure(figures, 'seconds', '.0f')} s",
        "for": f"{target_of(key)}, driver {key['driver']}" + "".join(f", {what}-compatible" for what in compatible),
        "graph": key["graph"],
        "weights": ", ".join(key["weights"]) or "none: put in when it is opened",
        "size": _mib(record.size),
        "gpu memory": f"weights {_mib(figures.get('weights', 0))}, activations {_mib(figures.get('activations', 0))}, "
        "as the builder says",
    }
    for name, value in lines.items():
        show(f"{name + ':':<12}{value}")
    for name, shapes in zip(key["profiles"], record.tensors.get("profiles", ()), strict=False):
        show(f"profile:    {name['name']}: batch {name['batch']}, {name['height']} x {name['width']} pixels")
        for tensor, bounds in shapes.items():
            show(f"            {tensor} {' to '.join(map(_shape, (bounds[0], bounds[-1])))}")
    for way in ("inputs", "outputs"):
        for item in record.tensors.get(way, ()):
            show(f"{way[:-1] + ':':<12}{item['name']} {item['dtype']} {_shape(item['shape'])}")


def _show_engine(record: PlanRecord) -> None:
    key, figures, weights = record.key, record.figures, record.weights
    lines = {
        "network": f"{key['network']} of {key['bundle']}, {key['precision']}",
        "built by": f"ONNX Runtime {key['version']} in {_figure(figures, 'seconds', '.0f')} s",
        "for": key["processor"],
        "graph": key["graph"],
        "weights": ", ".join(key["weights"]),
        "size": f"{record.size / 2**20:.1f} MiB"
        + (f", and {weights.size / 2**20:.1f} MiB of weights, mapped from their file" if weights is not None else ""),
        "parity": _engine_parity(figures),
    }
    for name, value in lines.items():
        show(f"{name + ':':<12}{value}")


def _engine_parity(figures: Mapping[str, float]) -> str:
    if "max_relative" in figures:
        return f"relative error {figures['max_relative']:.1e} against the bundle's graph"
    what = "matrix products and convolutions" if figures.get("convolutions") else "matrix products"
    error = _figure(figures, "root_mean_square", ".2%")
    return f"{what} in int8, at worst {error} (root mean square) off the bundle's graph on an unseen prompt"


def _figure(figures: Mapping[str, float], name: str, style: str) -> str:
    """One that its builder may not have stated."""
    return format(figures[name], style) if name in figures else "?"


def _shape(shape: list[Any]) -> str:
    return "x".join("?" if size == -1 else str(size) for size in shape)
