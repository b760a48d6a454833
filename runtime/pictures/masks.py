"""Drawing into a part of a picture.

A UNet with extra input channels for it (Stable Diffusion's inpainting models) is shown the mask and the rest of the
picture. Any other is held to the rest by noising that anew at every step; Lugmayr et al. 2022, "RePaint" (arXiv
2201.09865), without its resampling. In the end the rest is pasted back, pixel by pixel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.reading import HALF

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
FARTHEST = 2**30  # of a pixel in a mask without an outside


def fit_mask(mask: Image.Image, size: tuple[int, int], width: int, height: int) -> Mask:
    """Where to draw, (height, width): what is at least half white of a mask in mode L, cropped and scaled as the
    picture of that ``size`` (width, height) is.

    Raises:
        InputError: it has another size, or is black all over.
    """
    if mask.size != size:
        raise InputError(
            f"the mask has {mask.width}x{mask.height} pixels and the picture {size[0]}x{size[1]}; "
            "give a mask of the picture's size"
        )
    fitted = ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST)
    where: Mask = np.asarray(fitted) >= HALF
    if not where.any():
        raise InputError("the mask is black all over; paint what is to be drawn white")
    return where


def latent_mask(mask: Mask, factor: int) -> Mask:
    """The mask (H, W) in latents (H/f, W/f): those with any of their pixels in it."""
    height, width = mask.shape
    cells: Mask = np.any(mask.reshape(height // factor, factor, width // factor, factor), axis=(1, 3))
    return cells


def paste(drawn: Array, picture: NDArray[np.uint8], mask: Mask, feather: int) -> Array:
    """``drawn`` (H, W, 3) in 0..1 inside the mask and ``picture`` outside, exactly.

    ``feather`` is the number of pixels, inside the mask, over which one fades into the other.
    """
    most = max(feather, 1)
    alpha = np.minimum(_depth(mask), most).astype(np.float32)[:, :, None] / np.float32(most)
    known: Array = np.divide(picture, 255, dtype=np.float32)
    return drawn * alpha + known * (1 - alpha)


def _depth(mask: Mask) -> NDArray[np.int32]:
    """How many pixels each is from the next outside, diagonals as one; the picture's border is no outside.

    One sweep down and one up tell it of every pixel, however deep the mask is.
    """
    depth = np.where(mask, np.int32(FARTHEST), np.int32(0))
    columns = np.arange(mask.shape[1], dtype=np.int32)
    for rows in (depth, depth[::-1]):
        above = np.full(mask.shape[1] + 2, FARTHEST, np.int32)
        for row in rows:
            np.minimum(row, np.minimum(np.minimum(above[:-2], above[1:-1]), above[2:]) + 1, out=row)
            for way in (row, row[::-1]):
                np.minimum(way, np.minimum.accumulate(way - columns) + columns, out=way)
            above[1:-1] = row
    return depth
