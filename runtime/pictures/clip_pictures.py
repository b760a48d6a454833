"""Pictures as CLIP's image encoder takes them: its shorter side scaled to what it reads, cropped evenly, normalised.

Radford et al. 2021 (arXiv 2103.00020); the same numbers as transformers' ``CLIPImageProcessor`` makes.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from calotype.runtime.arrays import Array
from calotype.runtime.pictures.reading import Source, open_picture

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def clip_pixels(picture: Source, size: int) -> Array:
    """A picture as (3, size, size) of mean 0 and deviation 1 over those that CLIP was trained with.

    Raises:
        InputError: it cannot be read, or is no picture.
    """
    image = open_picture(picture)
    shorter = min(image.size)
    width, height = (size if side == shorter else int(size * side / shorter) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = np.asarray(scaled, np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1))
