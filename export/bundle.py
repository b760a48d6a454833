"""From a checkpoint to a bundle: weights, graphs and their checks, tokenizers, and the manifest last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from calotype.export.checkpoint import Checkpoint
from calotype.export.graphs import GraphPlan, by_component, tokenizer_spec
from calotype.export.parity import check, run_graph, run_module
from calotype.export.partial import PartialBundle
from calotype.export.precision import Gauge, find_islands, measure, part_of, run_float16, write_float16
from calotype.export.sources import load_checkpoint
from calotype.export.tracing import OPSET, write_graph, write_part
from calotype.export.weights import to_float32, write_weights
from calotype.runtime.bundle.manifest import MANIFEST_NAME, Defaults, Manifest, TokenizerSpec
from calotype.runtime.bundle.parity import Outputs
from calotype.runtime.bundle.schema import SchemaError, read_as
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import CheckpointError, ExportError, InputError
from calotype.runtime.version import __version__

WORDS = "words.txt"
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
# Is told the component, what is done for it now, and how much of it is done, 0 to 1.
Progress = Callable[[str, str, float], None]


def export_checkpoint(
    source: str | Path,
    bundle: Path,
    *,
    precision: str = "fp16",
    force: bool = False,
    ema: bool = False,
    prediction_type: str | None = None,
    variant: str | None = None,
    image_encoder: str | Path | None = None,
    safety_checker: bool = False,
    transformer: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Turn the checkpoint ``source`` into a bundle at ``bundle``, which appears whole or not at all.

    An export that was interrupted goes on after the last component it finished.

    Args:
        source: see :func:`calotype.export.sources.load_checkpoint`.
        bundle: the folder to make.
        precision: ``fp16`` stores weights in float16, for a graph that computes in float32 and one that computes in
            float16; ``fp32`` stores and computes in float32 alone.
        force: replace a bundle that is there.
        ema: take the averaged weights of a single file that carries both.
        prediction_type: overrides what the checkpoint says that its UNet predicts.
        variant: which of a folder's weights to take where there are several, as ``bf16``.
        image_encoder: the folder of an IP-Adapter's image encoder; None looks beside its file.
        safety_checker: whether the checkpoint's own safety checker becomes one more network.
        transformer: see :func:`calotype.export.sources.load_checkpoint`.
        progress: is told what begins.

    Raises:
        CheckpointError: the source cannot be read or does not match its configuration.
        ExportError: the target is in the way or cannot be written, or a graph misses its tolerance.
        InputError: an unknown precision, or a setting that the source does not have.
        MissingPackageError: the source is a repository of the Hub, and ``huggingface_hub`` is not installed.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; valid: {', '.join(PRECISIONS)}")
    _check_place(bundle, force)
    checkpoint = load_checkpoint(
        source,
        ema=ema,
        prediction_type=prediction_type,
        variant=variant,
        image_encoder=image_encoder,
        safety_checker=safety_checker,
        transformer=transformer,
    )
    _defaults(checkpoint)  # what is wrong with them is said before the work
    try:
        with PartialBundle(bundle, replace=force) as partial:
            networks, parity = _write_components(checkpoint, partial, precision, progress or (lambda *_: None))
            manifest = _manifest(checkpoint, partial, precision, networks, parity)
            partial.publish(manifest.dumps())
    except OSError as error:
        raise ExportError(f"{bundle} cannot be written: {error.strerror or error}") from error
    return manifest


def _check_place(bundle: Path, force: bool) -> None:
    """Raises ExportError where something, a link to nowhere too, is in the bundle's place and not to be replaced."""
    if os.path.lexists(bundle) and not (force and (bundle / MANIFEST_NAME).is_file()):
        why = "holds a bundle; use --force to replace it" if (bundle / MANIFEST_NAME).is_file() else "exists already"
        raise ExportError(f"{bundle} {why}")


def _manifest(
    checkpoint: Checkpoint,
    partial: PartialBundle,
    precision: str,
    networks: Mapping[str, ModelSpec],
    parity: Mapping[str, Any],
) -> Manifest:
    """What the bundle says of itself; its tokenizers and words are written for it."""
    return Manifest(
        name=str(checkpoint.card.get("name", checkpoint.source["name"])),
        family=checkpoint.family,
        kind=checkpoint.kind,
        precision=precision,
        networks=networks,
        tokenizers=_write_tokenizers(checkpoint, partial),
        scheduler=checkpoint.scheduler,
        vae=checkpoint.vae,
        defaults=_defaults(checkpoint),
        words=_write_words(checkpoint, partial),
        files=partial.files(),
        max_clip_skip=checkpoint.max_clip_skip,
        force_zeros_for_empty_prompt=checkpoint.force_zeros_for_empty_prompt,
        distilled=checkpoint.distilled,
        license=checkpoint.card.get("license"),
        attribution=tuple(checkpoint.card.get("attribution", ())),
        source=checkpoint.source,
        parity=parity,
    )


def _write_components(
    checkpoint: Checkpoint, partial: PartialBundle, precision: str, progress: Progress
) -> tuple[dict[str, ModelSpec], dict[str, Any]]:
    """The networks of all components and their parity reports; what a former run finished is not made again."""
    networks: dict[str, ModelSpec] = {}
    parity: dict[str, Any] = {}
    for component, own in by_component(checkpoint.graphs).items():
        module = checkpoint.components[component]
        key = _key(module, own, precision)
        report = partial.take_up(component, key)
        specs = {
            plan.network: plan.spec(("float32", "float16") if precision == "fp16" else ("float32",)) for plan in own
        }
        if report is None:
            to_float32(module)
            report = _write_component(module, own, specs, partial.folder, precision, progress)
            files = {path for spec in specs.values() for path in (*spec.graphs.values(), *spec.weights)}
            partial.finish(component, key, sorted(files), report)
        module.to("meta")
        progress(component, "done", 1.0)
        networks |= specs
        parity |= report
    return networks, parity


def _write_component(
    module: torch.nn.Module,
    own: list[GraphPlan],
    specs: Mapping[str, ModelSpec],
    folder: Path,
    precision: str,
    progress: Progress,
) -> dict[str, Any]:
    """Weights and graphs of one component; its parity report, by network."""
    component, half = own[0].component, precision == "fp16"
    count = 1 + len(own) * (4 if half else 2)
    done = iter(range(count))

    def begin(what: str) -> None:
        progress(component, what, next(done) / count)

    weights = folder / f"{component}.safetensors"
    begin("writing weights")
    write_weights(module, weights, PRECISIONS[precision])
    references: dict[str, Outputs] = {}
    for plan in own:
        begin(f"tracing {plan.network}")
        path = folder / specs[plan.network].graphs["float32"]
        if plan.whole is None:
            write_graph(plan, weights, path)
        else:
            write_part(folder / specs[plan.whole].graphs["float32"], plan, path)
        references[plan.network] = run_module(plan, plan.cases())
    module.to("meta")  # its memory is ONNX Runtime's now
    report: dict[str, Any] = {}
    measured: dict[str, dict[str, Gauge]] = {}
    for plan in own:
        graph, reference = folder / specs[plan.network].graphs["float32"], references[plan.network]
        begin(f"checking {plan.network}")
        figures = check(plan, "float32", graph, run_graph(graph, plan.cases()), reference)
        report[plan.network] = {"float32": dataclasses.asdict(figures)}
        if half:
            begin(f"measuring {plan.network}")
            path = folder / specs[plan.network].graphs["float16"]
            if plan.whole is None or plan.additions or plan.image_prompts:
                measured[plan.network] = measure(graph, plan.cases())
            gauges = part_of(measured.get(plan.network) or measured[plan.whole or ""], graph)
            islands = find_islands(graph, gauges)
            write_float16(graph, islands, path)
            begin(f"checking {plan.network} in float16")
            run_graph(path, {"random": plan.cases()["random"]})  # it is valid; the figures are not ONNX Runtime's
            figures = check(plan, "float16", path, run_float16(graph, islands, plan.cases()), reference)
            report[plan.network]["float16"] = dataclasses.asdict(figures) | {
                "largest_in_float16": max(gauge.largest for name, gauge in gauges.items() if name not in islands),
                "float32_islands": {name: dataclasses.asdict(gauge) for name, gauge in islands.items()},
            }
    return report


def _key(module: torch.nn.Module, own: list[GraphPlan], precision: str) -> str:
    """What a finished component was made of: its weights, its graphs' inputs, and this program."""
    specs = [plan.spec(()).to_json() for plan in own]
    digest = hashlib.sha256(json.dumps([__version__, torch.__version__, OPSET, precision, specs]).encode())
    digest.update(repr(getattr(module, "config", None)).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write_tokenizers(checkpoint: Checkpoint, partial: PartialBundle) -> dict[str, TokenizerSpec]:
    specs = {}
    for name, tokenizer in checkpoint.tokenizers.items():
        spec = specs[name] = tokenizer_spec(name, tokenizer)
        (partial.folder / name).mkdir(exist_ok=True)
        (partial.folder / spec.vocab).write_bytes(tokenizer.vocab)
        (partial.folder / spec.merges).write_bytes(tokenizer.merges)
        partial.finish(name, "", (spec.vocab, spec.merges), {})
    return specs


def _write_words(checkpoint: Checkpoint, partial: PartialBundle) -> str | None:
    """The words that a small model was taught, where its card lists them; returns their file."""
    words = checkpoint.card.get("words")
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) and word.isalpha() for word in words):
        raise CheckpointError("the words in model_card.json are no list of words")
    (partial.folder / WORDS).write_text("\n".join(sorted(words)) + "\n", encoding="utf-8")
    partial.finish("words", "", (WORDS,), {})
    return WORDS


def _defaults(checkpoint: Checkpoint) -> Defaults:
    pixels = (checkpoint.sample_size or 64) * checkpoint.vae.downscale
    try:
        given = {**checkpoint.defaults, **checkpoint.card.get("defaults", {})}
        return read_as(Defaults, {"height": pixels, "width": pixels, **given}, "defaults")
    except (SchemaError, TypeError) as error:
        raise CheckpointError(f"the defaults in model_card.json are not valid: {error}") from error
