"""Reference pictures of models that edit: shrunk to what such a model is shown, and cropped to whole tokens."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.reading import Source, open_picture, picture_source

MOST_REFERENCES = 10  # of one picture
MOST_PIXELS = 1024 * 1024  # of one of them; a larger one is shrunk, as in diffusers
MOST_RATIO = 8  # of its sides


def fit_reference(picture: Source, factor: int) -> NDArray[np.uint8]:
    """A reference picture as a model is shown it, (height, width, 3): of sides that ``factor`` divides.

    Raises:
        InputError: it cannot be read, or is smaller than a token, or far longer than wide.
    """
    image = open_picture(picture)
    width, height = image.size
    if min(width, height) < factor or max(width, height) > MOST_RATIO * min(width, height):
        raise InputError(
            f"the reference picture has {width}x{height} pixels; valid: {factor} or more each way, and at most "
            f"{MOST_RATIO} times as long as wide; crop it"
        )
    if width * height > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (width * height))
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)
    width, height = (side // factor * factor for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def checked_references(name: str, value: object) -> tuple[Source, ...]:
    """The reference pictures of a request; raises InputError where they are none, or too many."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{name}={quoted(value)} is no list of pictures; give a list, of one picture too")
    if len(value) > MOST_REFERENCES:
        raise InputError(f"{len(value)} {name} are more than the {MOST_REFERENCES} that one picture takes; use fewer")
    return tuple(picture_source(f"{name}[{number}]", item) for number, item in enumerate(value))
