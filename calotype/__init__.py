"""Fast text-to-image engines from Stable Diffusion checkpoints, run without PyTorch.

The names below are imported when they are first used, so that ``import calotype`` itself costs nothing. The rooms
``calotype.runtime``, ``calotype.export`` and ``calotype.engine`` are sub-packages that lie beside this folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calotype.runtime.version import __version__

if TYPE_CHECKING:
    from calotype.runtime import errors as errors
    from calotype.runtime.pipeline import Pipeline as Pipeline

__all__ = ["Pipeline", "__version__", "errors"]

_HOMES = {"Pipeline": "calotype.runtime.pipeline"}


def __getattr__(name: str) -> Any:
    """Import what is asked for; what is not there is an AttributeError, as for any module."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "errors":
        return importlib.import_module("calotype.runtime.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
