"""What a picture and a mask of any mode mean: colours in RGB, and brightness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.bounds import check_size
from calotype.runtime.pictures.colours import to_srgb
from calotype.runtime.pictures.opening import opened, opened_data, reading

# A picture to start from, or the file that holds it.
Source = Image.Image | str | Path

ORIENTATION = 0x0112
HALF = 128
# Pillow scales the greys of a PNG of two and four bits to eight, and leaves the one that is transparent as it is.
GREY_STEPS = {"L;2": 85, "L;4": 17}
TO_8_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


def load_image(path: Path) -> Image.Image:
    """Read a picture file as RGB; see :func:`to_rgb`. What is too large is refused before it is decoded.

    Raises:
        InputError: there is none, it is no picture, or it is too large.
    """
    with opened(path) as image:
        return to_rgb(image)


def read_picture(data: bytes, name: str) -> Image.Image:
    """The content of a picture file as RGB, within the bounds that files have; raises InputError with its ``name``."""
    with opened_data(data, name) as image:
        return to_rgb(image)


def picture_of(array: NDArray[Any], name: str) -> Image.Image:
    """The image that an array holds: (H, W), (H, W, 3) or (H, W, 4), of uint8, of booleans, or of floats in 0..1.

    Raises:
        InputError: it is no such array.
    """
    pixels = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or 0 in pixels.shape:
        raise InputError(f"{name} is an array of the shape {array.shape}; give (height, width, 3), or (height, width)")
    if pixels.dtype.kind == "f":
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise InputError(f"{name} is an array of floats that are not all in 0..1; scale them, or give uint8")
        pixels = (pixels * 255).round().astype(np.uint8)
    elif pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        raise InputError(f"{name} is an array of {array.dtype}; give uint8, or floats in 0..1")
    return Image.fromarray(np.ascontiguousarray(pixels))


def picture_source(name: str, value: Any) -> Source:
    """The picture that an argument is: a PIL image, an array, or a file; raises InputError for anything else."""
    if isinstance(value, str | Path):
        return Path(value)
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return picture_of(value, name)
    kind = type(value).__name__
    raise InputError(f"{name} is of type {kind}, not a picture; give a PIL image, an array or a file's path")


def open_picture(picture: Source) -> Image.Image:
    """A call's picture as RGB; raises InputError."""
    if isinstance(picture, str | Path):
        return load_image(Path(picture))
    with reading("the picture"):
        return to_rgb(_checked(picture))


def open_mask(mask: Source) -> Image.Image:
    """A call's mask in 256 greys; see :func:`to_brightness`. Raises InputError."""
    if isinstance(mask, str | Path):
        with opened(Path(mask)) as image:
            return to_brightness(image)
    with reading("the mask"):
        return to_brightness(_checked(mask))


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, in sRGB by its colour profile; 16 bits become 8, and transparency white.

    Of several frames the first stays.

    Raises:
        InputError: its pixels are floating-point numbers, which have no agreed white, or of a mode unknown here.
    """
    colours, alpha = _split(image)
    own = to_srgb(colours, image.info.get("icc_profile"))
    if alpha is None:
        return own
    page = Image.new("RGB", own.size, "white")
    page.paste(own, mask=alpha)
    return page


def to_brightness(image: Image.Image) -> Image.Image:
    """A mask's greys, upright, in mode L: what is drawn over is white.

    That is brightness alone, as diffusers has it: the colours that a file keeps under transparency count. Where they
    say nothing, as all of them are white or all black, opaque is white, as in AUTOMATIC1111's web interface.

    Raises:
        InputError: as :func:`to_rgb`.
    """
    colours, alpha = _split(image)
    grey = colours.convert("L")
    if alpha is not None and not _varies(grey, HALF) and _varies(alpha, HALF + 1):
        return alpha.point([255 * (level > HALF) for level in range(256)])
    return grey


def to_transparency(image: Image.Image) -> Image.Image | None:
    """How transparent it is, upright, in mode L: white is nothing, black is opaque; None where it says nothing of it.

    Raises:
        InputError: as :func:`to_rgb`.
    """
    _, alpha = _split(image)
    return None if alpha is None else ImageOps.invert(alpha)


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover ``width`` x ``height`` and cropped evenly from both sides of what is left over."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _checked(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise InputError(f"what is of type {kind} is not a picture; give a PIL image or a file's path")
    check_size(image, "the picture")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Without a copy where it stands upright already: of the largest pictures that is a quarter of a gigabyte."""
    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Upright: colours of eight bits without transparency, and alpha where there is any."""
    if image.mode == "F":
        raise InputError("the picture has floating-point pixels; save it with 8 or 16 bits")
    _mend_key(image)
    image.load()
    image, key = _upright(image), image.info.get("transparency")
    if image.mode.startswith("I"):  # Pillow's own conversion of 16 bits clips them
        values = np.asarray(image)
        grey = Image.fromarray(TO_8_BITS[values if values.dtype == np.uint16 else values.clip(0, 65535)])
        return grey, Image.fromarray(np.where(values == key, np.uint8(0), np.uint8(255))) if key is not None else None
    try:
        if not image.has_transparency_data:
            known = image.mode in ("1", "L", "RGB", "CMYK")
            return image if known else image.convert("RGB"), None
        whole = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
        return whole.convert(whole.mode[:-1]), whole.getchannel("A")
    except ValueError:
        raise InputError(f"the picture has pixels of the mode {image.mode}; save it as RGB") from None


def _mend_key(image: Image.Image) -> None:
    """Bring the colour of a PNG that is transparent to the eight bits that Pillow brings its pixels to."""
    key = image.info.get("transparency")
    raw = next((tile[3] for tile in getattr(image, "tile", ())), None)
    if isinstance(key, int) and raw in GREY_STEPS:
        image.info["transparency"] = key * GREY_STEPS[raw]
    elif isinstance(key, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _varies(image: Image.Image, threshold: int) -> bool:
    """Whether some of its pixels reach ``threshold`` and some do not."""
    low, high = image.getextrema()
    assert isinstance(low, int | float) and isinstance(high, int | float)  # it has one channel
    return low < threshold <= high
