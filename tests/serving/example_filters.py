"""Output filters as an operator writes them; what each does, the prompt says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from calotype.serving.errors import FilteredError


def check(image: Image.Image, about: Mapping[str, Any]) -> Any:
    """Pass, change, refuse, fail."""
    match about["prompt"].split()[0]:
        case "refuse":
            raise FilteredError("it shows no apple")
        case "invert":
            return ImageOps.invert(image)
        case "fail":
            raise RuntimeError("cannot open /secret/place")
        case "nothing":
            return None
        case "crop":
            return image.crop((0, 0, 8, 8))
    return image


NUMBER = 3
