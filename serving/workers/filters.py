"""What a finished picture has to pass before anybody sees it: the model's safety checker, and the operator's filter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from calotype.runtime.errors import InputError, quoted
from calotype.serving.errors import DrawingError, FilteredError
from calotype.serving.tasks import Pixels

# Is given a picture and what it was drawn from, and gives the picture back, the same or another of its size; raises
# FilteredError where nobody is to see it.
Filter = Callable[[Image.Image, Mapping[str, Any]], Image.Image]
UNSAFE = "the safety checker takes the picture for one that is not fit for everybody; nothing is shown"


def load_filter(name: str) -> Filter:
    """The callable of the name ``module:function``; a name of several parts is one of an object in the module.

    Raises:
        InputError: there is none, or its module fails when it is imported.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever is in somebody's module
        raise InputError(
            f"the output filter {quoted(name)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise InputError(f"the output filter {quoted(name)} is a {type(found).__name__}, and cannot be called")
    return found  # type: ignore[no-any-return]


def filtered(own: Filter, pixels: Pixels, about: Mapping[str, Any]) -> Pixels:
    """What a filter makes of a picture, (H, W, 3) of the same size.

    Raises:
        FilteredError: it refuses the picture, and says why.
        DrawingError: it failed, or gave no such picture; what it was given is not shown.
    """
    try:
        made = own(Image.fromarray(pixels), about)
    except FilteredError:
        raise
    except Exception as error:
        raise DrawingError(f"the output filter failed ({type(error).__name__}); the picture is not shown") from error
    size = (pixels.shape[1], pixels.shape[0])
    if not isinstance(made, Image.Image) or made.size != size:
        raise DrawingError("the output filter gave no picture of the same size; the picture is not shown")
    return np.asarray(made.convert("RGB"))
