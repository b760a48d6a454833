"""Everything a picture needs at run time, without PyTorch.

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calotype.runtime.version import __version__

if TYPE_CHECKING:
    from calotype.runtime.adapters.lora import Lora as Lora
    from calotype.runtime.control import Control as Control
    from calotype.runtime.image_prompt import ImagePrompt as ImagePrompt
    from calotype.runtime.picture import Output as Output
    from calotype.runtime.picture import Picture as Picture
    from calotype.runtime.pipeline import Pipeline as Pipeline
    from calotype.runtime.request import Request as Request

HOMES = {
    "Control": "calotype.runtime.control",
    "ImagePrompt": "calotype.runtime.image_prompt",
    "Lora": "calotype.runtime.adapters.lora",
    "Output": "calotype.runtime.picture",
    "Picture": "calotype.runtime.picture",
    "Pipeline": "calotype.runtime.pipeline",
    "Request": "calotype.runtime.request",
}
__all__ = ["Control", "ImagePrompt", "Lora", "Output", "Picture", "Pipeline", "Request", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
