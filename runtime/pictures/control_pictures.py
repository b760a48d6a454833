"""Control pictures: fitted to the picture that is drawn, and made of others where that needs no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.edges import canny
from calotype.runtime.pictures.reading import HALF, Source, fit_image, open_picture

Array = NDArray[np.float32]


def _stretched(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _contained(image: Image.Image, width: int, height: int) -> Image.Image:
    return ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _black_and_white(image: Image.Image, level: int) -> Image.Image:
    return image.convert("L").point([255 * (value >= level) for value in range(256)]).convert("RGB")


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """What a control picture is made into: ``make``, and the levels 0..255 that it takes where none are given."""

    make: Callable[..., Image.Image]
    levels: tuple[int, ...] = ()


# How a picture of another size is fitted: scaled to cover and cropped evenly, as a picture to start from is; scaled to
# the size whatever its shape; scaled to fit, with black around it.
RESIZES: Mapping[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "crop": fit_image,
    "stretch": _stretched,
    "pad": _contained,
}
# What needs no model: Canny's edges; greys; black and white, by half the brightness. "inpaint" marks what the mask
# covers.
PREPROCESSORS: Mapping[str, Preprocessor] = {
    "canny": Preprocessor(make=canny, levels=(100, 200)),
    "grayscale": Preprocessor(make=_grey),
    "threshold": Preprocessor(make=_black_and_white, levels=(HALF,)),
    "inpaint": Preprocessor(make=_as_it_is),
}


def parse_preprocessor(text: object) -> tuple[str, tuple[int, ...]]:
    """Read ``NAME`` or ``NAME-LEVEL-LEVEL``, as in ``canny-50-150``: the name in ``PREPROCESSORS``, and its levels.

    Raises:
        InputError: it is none, or has too many or too few levels, or not of 0..255.
    """
    name, *levels = text.split("-") if isinstance(text, str) else [""]
    found = PREPROCESSORS.get(name)
    if found is None:
        raise InputError(f"a control's preprocess={quoted(text)} is not known; valid: {', '.join(PREPROCESSORS)}")
    if not levels:
        return name, found.levels
    numbers = tuple(int(level) for level in levels if level.isascii() and level.isdecimal() and len(level) < 4)
    if len(numbers) != len(levels) or len(levels) != len(found.levels) or max(numbers) > 255:
        usual = "-".join([name, *map(str, found.levels)])
        raise InputError(f"a control's preprocess={quoted(text)} has other levels than {usual} has, each 0 to 255")
    return name, numbers


def control_pixels(
    image: Source | None, canvas: Canvas, *, preprocess: str | None, resize: str, channels: int = 3
) -> Array:
    """A control picture as a network takes it, (channels, height, width) in 0..1, and -1 where it is to inpaint.

    Args:
        image: the picture; None is the one to start from.
        canvas: what is drawn on.
        preprocess: what is made of it; see :func:`parse_preprocessor`. None takes it as it is.
        resize: how of ``RESIZES`` it is fitted.
        channels: 3 is RGB, 1 greys.

    Raises:
        InputError: there is none, or it cannot be read, or there is no mask to inpaint by.
        MissingPackageError: what it is made by is not installed.
    """
    if image is not None:
        fitted = RESIZES[resize](open_picture(image), canvas.width, canvas.height)
    elif canvas.picture is not None:
        fitted = Image.fromarray(canvas.picture)
    else:
        raise InputError("a control has no picture, and there is none to start from; give one of them")
    if preprocess is not None:
        name, levels = parse_preprocessor(preprocess)
        fitted = PREPROCESSORS[name].make(fitted, *levels)
    if fitted.size != (canvas.width, canvas.height):  # after that, so that no edge is seen where it ends
        whole = Image.new("RGB", (canvas.width, canvas.height))
        whole.paste(fitted, ((whole.width - fitted.width) // 2, (whole.height - fitted.height) // 2))
        fitted = whole
    array = np.asarray(fitted if channels == 3 else fitted.convert("L"), np.float32) / np.float32(255)
    pixels = array.reshape(canvas.height, canvas.width, channels).transpose(2, 0, 1)
    if preprocess == "inpaint":
        if canvas.mask is None:
            raise InputError("a control of inpainting takes the mask of the picture; give image and mask_image")
        pixels[:, canvas.mask] = -1
    return np.ascontiguousarray(pixels)
