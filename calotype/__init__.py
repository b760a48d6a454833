"""Fast text-to-image engines from Stable Diffusion checkpoints, run without PyTorch.

    from calotype import Pipeline

    with Pipeline.load("talbot") as pipeline:
        pipeline("red apple, noto style", seed=0).pictures[0].save("apple.png")

The names below are imported when they are first used, so that ``import calotype`` itself costs nothing. The rooms
``calotype.runtime``, ``calotype.export`` and ``calotype.engine`` are sub-packages that lie beside this folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import calotype.runtime
from calotype.runtime.version import __version__

if TYPE_CHECKING:
    from calotype.runtime import Control as Control
    from calotype.runtime import ImagePrompt as ImagePrompt
    from calotype.runtime import Lora as Lora
    from calotype.runtime import Output as Output
    from calotype.runtime import Picture as Picture
    from calotype.runtime import Pipeline as Pipeline
    from calotype.runtime import Request as Request
    from calotype.runtime import errors as errors

__all__ = ["Control", "ImagePrompt", "Lora", "Output", "Picture", "Pipeline", "Request", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("calotype.runtime.errors")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(calotype.runtime, name)


def __dir__() -> list[str]:
    return sorted(__all__)
