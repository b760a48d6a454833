"""Colour profiles (ICC): a picture's own colours in sRGB, which models are taught in."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

# What a profile calls its colours, and Pillow.
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
MAX_PROFILE = 2**23
# Profiles of sRGB itself move some colours by this much of 255, for rounding.
ROUNDING = 2
STEPS = 9


def to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """``image``, which has no transparency, in RGB as people see it with ``profile``.

    A profile that is sRGB's own changes nothing at all; one that cannot be used is named in a warning.
    """
    if isinstance(profile, bytes) and profile:
        try:
            return _transformed(image, profile)
        except Exception as error:  # ImageCms has an exception of its own, and a Pillow without it another
            logger.warning("a picture's colour profile cannot be used (%s); its colours are taken as sRGB", error)
    return image if image.mode == "RGB" else image.convert("RGB")


def _transformed(image: Image.Image, profile: bytes) -> Image.Image:
    if len(profile) > MAX_PROFILE:
        raise ValueError(f"it has more than {MAX_PROFILE} bytes")
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = own.profile.xcolor_space.strip()
    mode = MODES.get(space)
    if mode is None or (mode != "RGB" and mode != image.mode):
        raise ValueError(f"it is about {space} colours, and the picture has {image.mode}")
    transform = ImageCms.buildTransform(
        own,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    ready = image if image.mode == mode else image.convert(mode)
    if mode != "CMYK" and _is_srgb(transform, mode):
        return ready.convert("RGB") if mode != "RGB" else ready
    changed = ImageCms.applyTransform(ready, transform)
    assert changed is not None  # it is not asked to change the picture in place
    return changed


def _is_srgb(transform: Any, mode: str) -> bool:
    """Whether ``transform`` leaves colours of all kinds where they are."""
    if mode == "L":
        sample = Image.linear_gradient("L")
    else:
        levels = np.linspace(0, 255, STEPS).round().astype(np.uint8)
        sample = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, STEPS, 3))
    changed = ImageCms.applyTransform(sample, transform)
    difference = np.asarray(changed, np.int16) - np.asarray(sample.convert("RGB"), np.int16)
    return bool(np.abs(difference).max() <= ROUNDING)
