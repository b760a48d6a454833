"""Where checkpoints come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from calotype.export.checkpoint import Checkpoint
from calotype.export.diffusers_folder import load_folder
from calotype.export.hub import download, is_repository
from calotype.export.single_file import SUFFIXES, load_from_standard_weights
from calotype.runtime.errors import CheckpointError, InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def load_checkpoint(source: str | Path, *, ema: bool = False, prediction_type: str | None = None) -> Checkpoint:
    """Load a folder in diffusers' layout, an original single file, or a repository of the Hugging Face Hub.

    Args:
        source: a path, or ``owner/name`` with ``@revision`` or without.
        ema: the averaged weights of a single file that carries both.
        prediction_type: overrides what the checkpoint says that its UNet predicts.

    Raises:
        CheckpointError: there is none, or it cannot be read, or does not match its configuration.
        UnsupportedArchitectureError: it is of an architecture that is not supported.
        InputError: an unknown prediction type, or averaged weights of a folder.
        MissingPackageError: a repository, and ``huggingface_hub`` is not installed.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise InputError(f"prediction type {prediction_type!r} is not known; valid: {', '.join(PREDICTION_TYPES)}")
    path = Path(source)
    if path.is_file():
        return load_from_standard_weights(path, ema=ema, prediction_type=prediction_type)
    if ema:
        raise InputError(f"{source} holds one set of weights; averaged ones are taken from original single files only")
    if path.is_dir():
        checkpoint = load_folder(path)
    elif path.suffix not in SUFFIXES and is_repository(str(source)):
        folder = download(str(source))
        checkpoint = dataclasses.replace(
            load_folder(folder), source={"layout": "diffusers", "name": str(source), "revision": folder.name}
        )
    else:
        raise CheckpointError(
            f"{source} does not exist; give a folder in diffusers' layout, a single file ({', '.join(SUFFIXES)}), or a "
            "repository of the Hugging Face Hub (owner/name)"
        )
    if prediction_type is None or checkpoint.unet is None:
        return checkpoint
    return dataclasses.replace(checkpoint, scheduler={**checkpoint.scheduler, "prediction_type": prediction_type})
