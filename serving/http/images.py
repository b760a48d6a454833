"""Pictures on their way in and out: uploads decoded within bounds, pixels encoded with the settings that made them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import Sequence

from PIL import Image

from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import InputError
from calotype.runtime.pictures.masks import fit_mask
from calotype.runtime.pictures.opening import opened_data
from calotype.runtime.pictures.reading import fit_image, to_rgb, to_transparency
from calotype.runtime.pictures.references import fit_reference
from calotype.runtime.pictures.writing import QUALITY, encode
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.limits import Limits
from calotype.serving.tasks import Pixels

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
PATCH = 16  # pixels each way that count as one token
DECODINGS = 2  # at once: each may take several bytes a pixel of what is uploaded

Size = tuple[int, int]  # width and height in pixels


class Uploads:
    """Decodes what clients send, a few pictures at a time."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(DECODINGS)

    async def picture(self, data: bytes, name: str, limits: Limits) -> Image.Image:
        """A picture file as RGB; raises RequestRefusedError, of the field ``name``."""
        async with self._room:
            return await asyncio.to_thread(_picture, data, name, limits)

    async def mask(self, data: bytes, name: str, limits: Limits) -> Image.Image:
        """OpenAI's mask, which is transparent where something is to be drawn, as ours: there it is white, in mode L.

        Raises:
            RequestRefusedError: of the field ``name``: it has no transparency.
        """
        async with self._room:
            return await asyncio.to_thread(_mask, data, name, limits)

    async def fitted(self, picture: Image.Image, mask: Image.Image | None, size: Size) -> tuple[Image.Image, ...]:
        """Picture and mask in the size that is drawn: what is left over is not kept while they wait.

        Raises:
            RequestRefusedError: the mask has another size than the picture, or draws nothing.
        """
        async with self._room:
            return await asyncio.to_thread(_fitted, picture, mask, size)

    async def shown(self, pictures: Sequence[Image.Image], factor: int) -> list[Image.Image]:
        """Reference pictures in the size that a model is shown; raises RequestRefusedError, of the field ``image``."""
        async with self._room:
            return await asyncio.to_thread(_shown, pictures, factor)


def decoded(text: str, field: str) -> bytes:
    """The bytes of a picture in base64, with or without ``data:image/…;base64,`` before it.

    Raises:
        RequestRefusedError: it is something else; an address is never followed.
    """
    if text.startswith(("http:", "https:", "file:")):
        raise RequestRefusedError(f"{field} is an address, and none is followed; send the picture", param=field)
    head, comma, rest = text.partition(",")
    body = rest if comma and head.startswith("data:") else text
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RequestRefusedError(f"{field} is no base64; encode the bytes of a picture file", param=field) from None


async def encoded(pixels: Pixels, parameters: str, kind: str, quality: int | None = None) -> bytes:
    """The file of a picture.

    Args:
        pixels: (H, W, 3), RGB.
        parameters: the text of the settings that made it.
        kind: a name in ``FORMATS``.
        quality: 0..100, of jpeg and webp; None is as for files that ``calotype generate`` writes.
    """
    return await asyncio.to_thread(
        lambda: encode(
            Image.fromarray(pixels), FORMATS[kind], parameters, quality=QUALITY if quality is None else quality
        )
    )


def automatic(picture: Size, manifest: Manifest) -> Size:
    """The size to draw a picture in where none is asked for: its own, or of its proportions and as many pixels as the
    model's own pictures have, where it has more.
    """
    factor, default = manifest.vae.downscale, manifest.defaults
    scale = min(1.0, math.sqrt(default.width * default.height / (picture[0] * picture[1])))
    width, height = (max(factor, int(side * scale) // factor * factor) for side in picture)
    return width, height


def tokens(size: Size) -> int:
    """How many tokens a picture counts as, for clients that count them: its patches of 16x16 pixels."""
    return math.ceil(size[0] / PATCH) * math.ceil(size[1] / PATCH)


def _picture(data: bytes, name: str, limits: Limits) -> Image.Image:
    try:
        with opened_data(data, name) as image:
            limits.check_upload(image.size, name)
            return to_rgb(image)
    except InputError as error:
        raise RequestRefusedError(error, param=name) from None


def _mask(data: bytes, name: str, limits: Limits) -> Image.Image:
    try:
        with opened_data(data, name) as image:
            limits.check_upload(image.size, name)
            found = to_transparency(image)
    except InputError as error:
        raise RequestRefusedError(error, param=name) from None
    if found is None:
        raise RequestRefusedError(f"{name} has no transparency; make transparent what is to be drawn", param=name)
    return found


def _shown(pictures: Sequence[Image.Image], factor: int) -> list[Image.Image]:
    try:
        return [Image.fromarray(fit_reference(picture, factor)) for picture in pictures]
    except InputError as error:
        raise RequestRefusedError(error, param="image") from None


def _fitted(picture: Image.Image, mask: Image.Image | None, size: Size) -> tuple[Image.Image, ...]:
    width, height = size
    fitted = fit_image(picture, width, height)
    if mask is None:
        return (fitted,)
    try:
        where = fit_mask(mask, picture.size, width, height)
    except InputError as error:
        same = mask.size == picture.size
        line = "the mask is opaque all over; make transparent what is to be drawn" if same else error
        raise RequestRefusedError(line, param="mask") from None
    return fitted, Image.fromarray(where)
