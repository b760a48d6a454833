"""From a checkpoint to a bundle: weights, graphs, tokenizer, parity report, and the manifest last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from calotype.export import parity
from calotype.export.checkpoint import Checkpoint
from calotype.export.graphs import plans, write_graph
from calotype.export.models.autoencoder import Autoencoder
from calotype.export.sources import load_checkpoint
from calotype.export.tokenizer import Tokenizer
from calotype.export.weights import write_weights
from calotype.runtime.errors import CheckpointError, ExportError, InputError, UnsupportedArchitectureError
from calotype.runtime.manifest import MANIFEST_NAME, Defaults, FileRecord, Manifest, TokenizerSpec, VaeSpec

PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
Progress = Callable[[str], None]


def export_checkpoint(
    source: Path, bundle: Path, *, precision: str = "fp16", force: bool = False, progress: Progress | None = None
) -> Manifest:
    """Turn the checkpoint folder ``source`` (diffusers' layout) into a bundle at ``bundle``.

    The bundle appears whole or not at all: it is made in a folder beside it, which is renamed at the end.

    Args:
        source: a folder with a ``model_index.json``.
        bundle: the folder to make.
        precision: how weights are stored, ``fp16`` or ``fp32``; graphs compute in float32 so far.
        force: replace a bundle that is there.
        progress: is told what begins.

    Raises:
        CheckpointError: the source cannot be read or does not match its configuration.
        ExportError: the target is in the way or cannot be written, or a graph misses its tolerance.
        InputError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; valid: {', '.join(PRECISIONS)}")
    if bundle.exists() and not (force and (bundle / MANIFEST_NAME).is_file()):
        why = "holds a bundle; use --force to replace it" if (bundle / MANIFEST_NAME).is_file() else "exists already"
        raise ExportError(f"{bundle} {why}")
    report = progress or (lambda _: None)
    report("reading the checkpoint")
    checkpoint = load_checkpoint(source)
    temporary = bundle.with_name(f".{bundle.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        manifest = _write(checkpoint, source, temporary, precision, report)
        if bundle.exists():
            shutil.rmtree(bundle)
        temporary.rename(bundle)
    except OSError as error:
        raise ExportError(f"{bundle} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _write(checkpoint: Checkpoint, source: Path, folder: Path, precision: str, report: Progress) -> Manifest:
    text_encoder, unet, vae = checkpoint.text_encoder, checkpoint.unet, checkpoint.vae
    if checkpoint.family not in ("sd1", "sd2") or not isinstance(vae, Autoencoder):
        raise UnsupportedArchitectureError(f"{source} is of family {checkpoint.family}; exported so far: sd1, sd2")
    assert text_encoder is not None and unet is not None and checkpoint.tokenizer is not None
    defaults = _defaults(checkpoint)
    for component in ("text_encoder", "unet", "vae"):
        write_weights(getattr(checkpoint, component), folder / f"{component}.safetensors", PRECISIONS[precision])
    networks, figures = {}, {}
    for plan in plans(text_encoder, unet, vae):
        spec = plan.spec()
        graph = folder / spec.graphs["float32"]
        report(f"tracing {plan.network}")
        write_graph(plan, folder / spec.weights[0], graph)
        report(f"checking {plan.network}")
        figures[plan.network] = {"float32": parity.check(plan, graph)}
        networks[plan.network] = spec
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_bytes(checkpoint.tokenizer.vocab)
    (folder / "tokenizer" / "merges.txt").write_bytes(checkpoint.tokenizer.merges)
    files = {str(path.relative_to(folder)): FileRecord.of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = Manifest(
        name=str(checkpoint.card.get("name", checkpoint.source["name"])),
        family=checkpoint.family,
        precision=precision,
        networks=networks,
        tokenizers={"tokenizer": _tokenizer(checkpoint.tokenizer, text_encoder.config.max_position_embeddings)},
        scheduler=checkpoint.scheduler,
        vae=_vae(checkpoint),
        defaults=defaults,
        files=files,
        license=checkpoint.card.get("license"),
        attribution=tuple(checkpoint.card.get("attribution", ())),
        source=checkpoint.source,
        parity=figures,
    )
    (folder / MANIFEST_NAME).write_text(manifest.dumps(), encoding="utf-8")
    return manifest


def _tokenizer(tokenizer: Tokenizer, max_length: int) -> TokenizerSpec:
    return TokenizerSpec(
        vocab="tokenizer/vocab.json",
        merges="tokenizer/merges.txt",
        max_length=max_length,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


def _vae(checkpoint: Checkpoint) -> VaeSpec:
    config = checkpoint.vae.config
    return VaeSpec(
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        latent_channels=config.latent_channels,
        downscale=config.downscale,
    )


def _defaults(checkpoint: Checkpoint) -> Defaults:
    pixels = (checkpoint.sample_size or 64) * checkpoint.vae.config.downscale
    try:
        return Defaults(**{"height": pixels, "width": pixels, **checkpoint.card.get("defaults", {})})
    except TypeError as error:
        raise CheckpointError(f"the defaults in model_card.json are not valid: {error}") from error
