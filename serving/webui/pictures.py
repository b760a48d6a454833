"""Pictures and masks as AUTOMATIC1111's web interface treats them: resized, filled, or a part of one at full size."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.opening import opened_data
from calotype.runtime.pictures.reading import fit_image, to_brightness, to_rgb
from calotype.runtime.pictures.writing import encode
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.images import decoded
from calotype.serving.http.limits import Limits
from calotype.serving.tasks import Pixels

Box = tuple[int, int, int, int]
JUST_RESIZE, CROP = 0, 1
FILL, ORIGINAL = 0, 1
# How far the surroundings are smeared into a hole, far first, as shares of the picture's longer side.
SMEARS = (1 / 4, 1 / 16, 1 / 64, 1 / 256)
SEEN = 128  # of 255: from there on a mask draws


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Over:
    """What is drawn over.

    Attributes:
        image: what the model is given.
        mask: where it draws, of the same size; None is everywhere.
        feather: in pixels, over which what is drawn fades into it.
        whole: the picture that ``image`` is a part of, in another size, and how much of each of its pixels is drawn;
            None where it is no part.
        box: of the part, as PIL has boxes.
    """

    image: Image.Image
    mask: Image.Image | None = None
    feather: int = 0
    whole: tuple[Image.Image, Image.Image] | None = None
    box: Box | None = None

    def finished(self, pixels: Pixels) -> Pixels:
        """The part that was drawn, (H, W, 3), in the picture that it was cut from."""
        if self.whole is None or self.box is None:
            return pixels
        (picture, where), (left, top, right, bottom) = self.whole, self.box
        part = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        page = picture.copy()
        page.paste(part, (left, top), where.crop(self.box))
        return np.asarray(page)


def opened(text: str, field: str, limits: Limits, *, mask: bool = False) -> Image.Image:
    """A picture as RGB; or a mask, in 256 greys.

    Raises:
        RequestRefusedError: it is no picture, or too large, which is told before it is decoded.
    """
    try:
        with opened_data(decoded(text, field), field) as image:
            limits.check_upload(image.size, field)
            return to_brightness(image) if mask else to_rgb(image)
    except RequestRefusedError:
        raise
    except InputError as error:
        raise RequestRefusedError(str(error), param=field) from error


def prepared(
    image: Image.Image,
    mask: Image.Image | None,
    size: tuple[int, int],
    *,
    resize_mode: int = JUST_RESIZE,
    invert: bool = False,
    fill: int = ORIGINAL,
    feather: int = 0,
    padding: int | None = None,
) -> Over:
    """What the model is given.

    Args:
        image: in RGB.
        mask: in 256 greys, of the same proportions.
        size: (width, height) of what is drawn.
        resize_mode: ``JUST_RESIZE`` stretches, ``CROP`` covers and cuts off evenly.
        invert: whether black is drawn instead of white.
        fill: what the model finds inside the mask: ``ORIGINAL``, or ``FILL``, the colours around it.
        feather: pixels over which what was drawn fades in.
        padding: pixels around the mask; its surroundings alone are drawn, in all of ``size``. None is the whole.

    Raises:
        RequestRefusedError: nothing of the mask is drawn.
    """
    if mask is None:
        return Over(image=_resized(image, size, resize_mode))
    grey = ImageOps.invert(mask) if invert else mask
    where = grey.resize(image.size, Image.Resampling.NEAREST).point([255 * (level >= SEEN) for level in range(256)])
    if where.getbbox() is None:
        raise RequestRefusedError("the mask draws nothing; paint what is to be drawn white", param="mask")
    whole, box = None, None
    if padding is None:
        image, where = _resized(image, size, resize_mode), _resized(where, size, resize_mode)
    else:
        # Inside the mask only, as elsewhere: what is outside comes back exactly.
        soft = ImageChops.darker(where, where.filter(ImageFilter.GaussianBlur(feather / 2)))
        whole, box, feather = (image, soft), _surroundings(where, size, padding), 0
        image = image.crop(box).resize(size, Image.Resampling.LANCZOS)
        where = where.crop(box).resize(size, Image.Resampling.NEAREST)
    if where.getbbox() is None:
        raise RequestRefusedError("nothing is left of the mask at this size; paint more of it white", param="mask")
    if fill == FILL:
        image = _filled(image, where)
    return Over(image=image, mask=where, feather=feather, whole=whole, box=box)


def encoded(pixels: Pixels, parameters: str = "") -> str:
    """A PNG with its settings, in base64."""
    return base64.b64encode(encode(Image.fromarray(pixels), "PNG", parameters)).decode()


def _resized(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    if mode == CROP and image.mode == "L":
        return ImageOps.fit(image, size, Image.Resampling.NEAREST)
    if mode == CROP:
        return fit_image(image, *size)
    return image.resize(size, Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS)


def _surroundings(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """The box around what is white, ``padding`` wider, in the proportions of ``size`` as far as there is room."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    width, height = right - left, bottom - top
    wanted = size[0] / size[1]
    if width / height < wanted:
        left, right = _widened(left, right, min(round(height * wanted), mask.width), mask.width)
    else:
        top, bottom = _widened(top, bottom, min(round(width / wanted), mask.height), mask.height)
    return left, top, right, bottom


def _widened(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    """As many from within 0..``most``, around the same middle where there is room."""
    length = max(length, high - low)
    start = min(max((low + high - length) // 2, 0), most - length)
    return start, start + length


def _filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """With the colours around it inside the mask: the outside is blurred more and more finely, and laid over itself."""
    outside = ImageOps.invert(mask)
    known = Image.new("RGBa", image.size)
    known.paste(image.convert("RGBA").convert("RGBa"), mask=outside)
    found = image.copy()
    for share in SMEARS:
        blurred = known.filter(ImageFilter.GaussianBlur(max(1.0, share * max(image.size)))).convert("RGBA")
        found.paste(blurred.convert("RGB"), mask=blurred.getchannel("A").point([min(255, 3 * a) for a in range(256)]))
    found.paste(image, mask=outside)
    return found
