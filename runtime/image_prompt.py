"""What a request says of one IP-Adapter: which, with which pictures, and how much of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from calotype.runtime import arguments
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.reading import Source, picture_source

MOST_PROMPTS = 4  # IP-Adapters of one picture, as many as a plan takes
MOST_IMAGES = 16  # of one IP-Adapter
WAYS = ("down", "mid", "up")
# One for all layers; or by way and block, as diffusers' set_ip_adapter_scale has it.
Scale = float | Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """One IP-Adapter of a request.

    Attributes:
        model: the name that the pipeline was given it by, or a path, the folder of its bundle.
        images: its pictures, each as a request's picture is given; one alone needs no list. Several are read together.
        scale: what it adds to each cross-attention is multiplied by. A mapping says it by layer, as
            ``{"down": {"block_2": [0, 1]}, "up": 0.5, "mid": 0}``: for one of the UNet's ways, for a block of one, or
            for each of that block's layers; what is left out is 0.

    Raises:
        InputError: a value is of a wrong type or out of range. What the UNet's blocks decide is checked later.
    """

    model: str | Path
    images: tuple[Source, ...]
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path) or not str(self.model):
            raise InputError(f"an image prompt's model={quoted(self.model)} is no name and no path; give one of them")
        given = self.images if isinstance(self.images, list | tuple) else (self.images,)
        if not 1 <= len(given) <= MOST_IMAGES:
            raise InputError(f"an image prompt has {len(given)} pictures; give 1 to {MOST_IMAGES}")
        images = tuple(picture_source("an image prompt's picture", image) for image in given)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "scale", _scale(self.scale))

    @classmethod
    def parse(cls, text: str) -> tuple[str, Path, Self]:
        """Read ``NAME=BUNDLE:PICTURE[,PICTURE…][:SCALE]``, as the command line has it.

        Returns:
            The name, the bundle's folder, and the image prompt.

        Raises:
            InputError: it cannot be read, or a value is out of range.
        """
        name, equals, rest = text.partition("=")
        parts = rest.split(":")
        pictures = parts[1].split(",") if len(parts) in (2, 3) else []
        if not equals or not re.fullmatch(r"[\w.-]+", name) or not parts[0] or not pictures or not all(pictures):
            raise InputError(
                f"the image prompt {quoted(text)} cannot be read; valid: NAME=BUNDLE:PICTURE[,PICTURE…][:SCALE], as in "
                "face=my-ip:face.png:0.6"
            )
        try:
            scale = float(parts[2]) if len(parts) == 3 else 1.0
        except ValueError:
            raise InputError(f"the image prompt {quoted(text)} has no number where its scale is due") from None
        return name, Path(parts[0]), cls(model=name, images=tuple(map(Path, pictures)), scale=scale)


def checked_image_prompts(name: str, value: object) -> tuple[ImagePrompt, ...]:
    """The image prompts of a request; raises InputError where they are none, or too many."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, ImagePrompt) for item in value):
        raise InputError(f"{name}={quoted(value)} is no list of image prompts; give [ImagePrompt(model=…, images=[…])]")
    if len(value) > MOST_PROMPTS:
        raise InputError(
            f"{len(value)} image prompts are more than the {MOST_PROMPTS} that one picture takes; use fewer, each with "
            "several pictures"
        )
    return tuple(value)


def _scale(value: Any) -> Scale:
    """A number; or numbers by way and block, lists as tuples."""
    if not isinstance(value, Mapping):
        return arguments.finite("an image prompt's scale", value)
    found: dict[str, Any] = {}
    for way, own in value.items():
        name = f"an image prompt's scale of {quoted(way)}"
        if way not in WAYS:
            raise InputError(f"{name} is of no part of a UNet; valid: {', '.join(WAYS)}")
        if isinstance(own, Mapping):
            found[way] = {_block(way, block): _numbers(f"{name}, {block}", item) for block, item in own.items()}
        else:
            found[way] = arguments.finite(name, own)
    return found


def _block(way: str, block: Any) -> str:
    if way == "mid" or not isinstance(block, str) or not re.fullmatch(r"block_\d{1,3}", block):
        raise InputError(f"an image prompt's scale of {way} has no {quoted(block)}; valid: block_0, block_1, …")
    return block


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    return arguments.numbers(name, value) if arguments.listed(value) else arguments.finite(name, value)
