"""Every error this project raises on purpose. A message names the value, the valid choices and the way out."""

from __future__ import annotations


class CalotypeError(Exception):
    """The root of the tree: catching it catches whatever the user can do something about."""


class BundleError(CalotypeError):
    """A bundle is missing, incomplete, corrupt, or of a format this version does not read."""


class CheckpointError(CalotypeError):
    """A checkpoint cannot be read, or its tensors do not match the architecture it claims."""


class UnsupportedArchitectureError(CheckpointError):
    """A checkpoint is sound, but of an architecture this project does not implement."""


class ExportError(CalotypeError):
    """An export failed, or its graphs do not compute what the PyTorch modules compute."""


class BuildError(CalotypeError):
    """An engine could not be built, or the plan cache could not be used."""


class BackendError(CalotypeError):
    """A backend is unknown, not installed, or has no hardware to run on; or it failed while running."""


class InputError(CalotypeError, ValueError):
    """An argument of a call, an option or a settings file is out of range or does not fit the model."""


class OutputError(CalotypeError):
    """A result cannot be written where it was asked for."""


class MissingPackageError(CalotypeError, ImportError):
    """A package that an extra installs is not there."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'calotype[{extra}]'")
