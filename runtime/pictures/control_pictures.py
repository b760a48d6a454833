"""Control pictures: fitted to the picture that is drawn, and made of others where that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.reading import HALF, Source, fit_image, open_picture

Array = NDArray[np.float32]


def _stretched(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """All of the picture, in the middle, and black around it."""
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _black_and_white(image: Image.Image) -> Image.Image:
    return image.convert("L").point([255 * (level >= HALF) for level in range(256)]).convert("RGB")


# How a picture of another size is fitted: scaled to cover and cropped evenly, as a picture to start from is; scaled to
# the size whatever its shape; scaled to fit, with black around it.
RESIZES: Mapping[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "crop": fit_image,
    "stretch": _stretched,
    "fill": _filled,
}
# What needs no model: greys; black and white, by half the brightness. "inpaint" marks what the mask covers.
PREPROCESSORS: Mapping[str, Callable[[Image.Image], Image.Image] | None] = {
    "grayscale": _grey,
    "threshold": _black_and_white,
    "inpaint": None,
}


def control_pixels(image: Source | None, canvas: Canvas, *, preprocess: str | None, resize: str) -> Array:
    """A control picture as a ControlNet takes it, (3, height, width) in 0..1, and -1 where it is to inpaint.

    Args:
        image: the picture; None is the one to start from.
        canvas: what is drawn on.
        preprocess: what of ``PREPROCESSORS`` is made of it.
        resize: how of ``RESIZES`` it is fitted.

    Raises:
        InputError: there is none, or it cannot be read, or there is no mask to inpaint by.
    """
    if image is not None:
        fitted = RESIZES[resize](open_picture(image), canvas.width, canvas.height)
    elif canvas.picture is not None:
        fitted = Image.fromarray(canvas.picture)
    else:
        raise InputError("a control has no picture, and there is none to start from; give one of them")
    make = None if preprocess is None else PREPROCESSORS[preprocess]
    pixels = np.asarray(fitted if make is None else make(fitted), np.float32).transpose(2, 0, 1) / np.float32(255)
    if preprocess == "inpaint":
        if canvas.mask is None:
            raise InputError("a control of inpainting takes the mask of the picture; give image and mask_image")
        pixels[:, canvas.mask] = -1
    return np.ascontiguousarray(pixels)
