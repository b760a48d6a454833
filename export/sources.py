"""Where checkpoints come from."""

from __future__ import annotations

from pathlib import Path

from calotype.export.checkpoint import Checkpoint
from calotype.export.diffusers_folder import load_folder
from calotype.runtime.errors import CheckpointError


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Load a folder in diffusers' layout.

    Raises:
        CheckpointError: there is none, or it cannot be read, or does not match its configuration.
        UnsupportedArchitectureError: it is of an architecture that is not supported.
    """
    path = Path(source)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder in diffusers' layout")
    return load_folder(path)
