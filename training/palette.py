"""The colour that a picture mostly has, and the same picture in another colour, so that prompts may ask for one.

Colours are compared in Oklab (Ottosson 2020, https://bottosson.github.io/posts/oklab/), where equal steps look equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# sRGB, near those of the coloured circles and hearts in the three sets.
NAMED = {
    "red": 0xDD2E44,
    "orange": 0xF58A1F,
    "yellow": 0xFDCB4E,
    "green": 0x6CA83A,
    "blue": 0x3F9BE0,
    "purple": 0x9A5FC8,
    "pink": 0xF77FB4,
    "brown": 0x9A5F42,
    "gray": 0x9AA4AA,
    "black": 0x35393C,
    "white": 0xEDEFF0,
}
NEUTRAL = ("gray", "black", "white")  # without a hue: a picture of theirs keeps its colour
TARGETS = tuple(name for name in NAMED if name not in NEUTRAL)
SHARE = 0.4  # of what is drawn, from which on a colour is the picture's
HUES = np.radians([30.0, 55.0])  # up to the first from the picture's own a pixel changes wholly, beyond the second not

# Linear sRGB to cone responses, their cube roots to Oklab.
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(pixels: NDArray[np.uint8]) -> Array:
    """(..., 3) sRGB bytes to lightness in 0..1 and the two opponent axes."""
    srgb = pixels / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return (np.cbrt(linear @ TO_CONES.T) @ TO_OKLAB.T).astype(np.float32)


def from_oklab(colours: Array) -> NDArray[np.uint8]:
    """The inverse; what sRGB cannot show is clipped."""
    linear = ((colours @ np.linalg.inv(TO_OKLAB).T) ** 3 @ np.linalg.inv(TO_CONES).T).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    pixels: NDArray[np.uint8] = (srgb * 255).round().astype(np.uint8)
    return pixels


PROTOTYPES = to_oklab(np.array([[value >> 16, value >> 8 & 255, value & 255] for value in NAMED.values()], np.uint8))


def main_colour(picture: NDArray[np.uint8]) -> str | None:
    """The name that most of what is drawn on white goes by; None where no colour covers ``SHARE`` of it."""
    names = _names(_drawn(picture))
    counts = np.bincount(names, minlength=len(NAMED))
    return tuple(NAMED)[counts.argmax()] if counts.max() >= max(1, SHARE * len(names)) else None


def recolour(picture: NDArray[np.uint8], target: str) -> NDArray[np.uint8]:
    """``picture`` with the hues around its main one turned to ``target``'s; others, and greys, stay.

    Raises:
        ValueError: the picture has no main colour, or it is none with a hue.
    """
    own = main_colour(picture)
    if own is None or own in NEUTRAL:
        raise ValueError(f"the picture is {own or 'of several colours'}: there is no hue to change")
    drawn = _drawn(picture)
    source = _polar(np.median(drawn[_names(drawn) == tuple(NAMED).index(own)], axis=0))
    goal = _polar(PROTOTYPES[tuple(NAMED).index(target)])
    lab = to_oklab(picture)
    light, chroma, hue = _polar(lab)
    turned = (hue - source[2] + np.pi) % (2 * np.pi) - np.pi
    weight = ((HUES[1] - abs(turned)) / (HUES[1] - HUES[0])).clip(0, 1) * (chroma / 0.04).clip(0, 1)
    # Black stays black and white white, while the main colour gets the target's lightness.
    lighter = light.clip(0, 1) ** (np.log(goal[0]) / np.log(source[0]))
    stronger = chroma * min(goal[1] / source[1], 2.0)
    angle = goal[2] + turned / 2
    changed = np.stack([lighter, stronger * np.cos(angle), stronger * np.sin(angle)], axis=-1)
    return from_oklab(lab + weight[..., None] * (changed - lab))


def _drawn(picture: NDArray[np.uint8]) -> Array:
    """The pixels that are not the white ground, (N, 3) in Oklab."""
    lab = to_oklab(picture.reshape(-1, 3))
    return lab[(lab[:, 0] < 0.97) | (np.hypot(lab[:, 1], lab[:, 2]) > 0.03)]


def _names(lab: Array) -> NDArray[np.int64]:
    """(N, 3) to (N,): the place of the nearest named colour; shading changes the lightness of one more than its hue."""
    scale = np.array([0.6, 1, 1], np.float32)
    return ((lab * scale) @ (PROTOTYPES * scale).T * 2 - np.square(PROTOTYPES * scale).sum(axis=1)).argmax(axis=1)


def _polar(lab: Array) -> tuple[Array, Array, Array]:
    """Lightness, chroma, and hue in radians."""
    return lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])
