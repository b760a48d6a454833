"""Where checkpoints come from, and which family each is of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from calotype.export.checkpoint import Checkpoint
from calotype.export.contents import SUFFIXES
from calotype.export.families import families
from calotype.export.folder import INDEX, Folder
from calotype.export.hub import download, is_repository
from calotype.export.safety_checker import with_safety_checker
from calotype.export.single_file import SingleFile
from calotype.export.strangers import refuse, refuse_alike, refuse_folder
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def load_checkpoint(
    source: str | Path,
    *,
    ema: bool = False,
    prediction_type: str | None = None,
    variant: str | None = None,
    image_encoder: str | Path | None = None,
    safety_checker: bool = False,
    transformer: Path | None = None,
) -> Checkpoint:
    """Load a folder in diffusers' layout, an original single file, or a repository of the Hugging Face Hub.

    Args:
        source: a path, or ``owner/name`` with ``@revision`` or without.
        ema: the averaged weights of a single file that carries both.
        prediction_type: overrides what the checkpoint says that its UNet predicts.
        variant: which of a folder's weights to take where there are several, as ``bf16``.
        image_encoder: the folder of an IP-Adapter's image encoder; None looks beside its file.
        safety_checker: whether to load the safety checker in a folder, too.
        transformer: a file whose transformer takes the place of the folder's.

    Raises:
        CheckpointError: there is none, or it cannot be read, or does not match its configuration.
        UnsupportedArchitectureError: it is of an architecture that is not supported.
        InputError: an unknown prediction type or variant, averaged weights of a folder, a variant of a file, or an
            image encoder of what is no IP-Adapter.
        MissingPackageError: a repository, and ``huggingface_hub`` is not installed.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise InputError(f"prediction type {prediction_type!r} is not known; valid: {', '.join(PREDICTION_TYPES)}")
    try:
        checkpoint = _load(source, ema, prediction_type, variant, image_encoder, safety_checker, transformer)
    except CheckpointError as error:
        if str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error
    if prediction_type is None or not checkpoint.scheduler:
        return checkpoint
    return dataclasses.replace(checkpoint, scheduler={**checkpoint.scheduler, "prediction_type": prediction_type})


def _load(
    source: str | Path,
    ema: bool,
    prediction_type: str | None,
    variant: str | None,
    image_encoder: str | Path | None,
    safety_checker: bool,
    transformer: Path | None,
) -> Checkpoint:
    """The same; what is wrong with a part of it does not name the file."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        if variant is not None:
            raise InputError(f"{source} is one file, which has no variants; export without --variant")
        if safety_checker:
            raise InputError(f"{source} is one file, which has no safety checker; export without --safety-checker")
        if transformer is not None:
            raise InputError(f"{source} is one file; give the folder whose transformer {transformer} is instead of")
        encoder = None if image_encoder is None else Path(image_encoder)
        file = SingleFile.open(path, ema=ema, prediction_type=prediction_type, image_encoder=encoder)
        checkpoint = load_file(file)
        if encoder is not None and checkpoint.kind != "ip-adapter":
            raise InputError(f"{source} is no IP-Adapter, which alone has an image encoder; leave --image-encoder out")
        return checkpoint
    if image_encoder is not None:
        raise InputError(f"{source} is no file of an IP-Adapter, which alone has an image encoder; leave it out")
    if ema:
        raise InputError(f"{source} holds one set of weights; averaged ones are taken from original single files only")
    if path.is_dir():
        if not (path / INDEX).exists():
            refuse_folder(path)
        folder, place = Folder.open(path, variant, transformer), dict[str, str]()
    elif path.suffix.lower() not in SUFFIXES and is_repository(str(source)):
        found = download(str(source), variant, safety_checker=safety_checker)
        folder = Folder.open(found, variant, transformer)
        place = {"name": str(source), "revision": folder.path.name}
    else:
        raise CheckpointError(
            f"{source} does not exist; give a folder in diffusers' layout, a single file ({', '.join(SUFFIXES)}), or a "
            "repository of the Hugging Face Hub (owner/name)"
        )
    checkpoint = _from_folder(folder)
    if safety_checker:
        checkpoint = with_safety_checker(checkpoint, folder)
    return dataclasses.replace(checkpoint, source={**checkpoint.source, **place})


def _from_folder(folder: Folder) -> Checkpoint:
    """Load a folder by the family that knows its pipeline."""
    for family in families():
        if folder.kind in family.pipelines and family.has_folder(folder):
            return family.load_folder(folder)
    supported = dict.fromkeys(name for family in families() for name in family.pipelines)
    raise UnsupportedArchitectureError(
        f"{folder.path} holds a {folder.kind}, which is not supported; supported: {', '.join(supported)}"
    )


def load_file(file: SingleFile) -> Checkpoint:
    """Load a single file by the family whose tensors it has; raises as :func:`load_checkpoint`."""
    known = ", ".join(family.known_as for family in families())
    refuse_alike(file, known)
    found = [family for family in families() if family.has_file(file)]
    if found:
        return found[-1].load_file(file)
    refuse(file, known)
