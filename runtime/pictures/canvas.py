"""What a call draws on: a size in pixels, the picture and the mask that it starts from, and pictures to go by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arguments import whole
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.masks import Mask, fit_mask, paste
from calotype.runtime.pictures.reading import Source, fit_image, open_mask, open_picture
from calotype.runtime.pictures.references import fit_reference

Array = NDArray[np.float32]

MAX_SIZE = 16384


class Pictured(Protocol):
    """The part of a request that a canvas is made of."""

    @property
    def height(self) -> int | None:
        """Pixels; None is the picture's own."""

    @property
    def width(self) -> int | None:
        """Pixels; None is the picture's own."""

    @property
    def image(self) -> Source | None:
        """The picture to start from."""

    @property
    def mask_image(self) -> Source | None:
        """Where to draw."""

    @property
    def references(self) -> Sequence[Source]:
        """Pictures that a model goes by."""

    @property
    def strength(self) -> float | None:
        """How much of the picture is given up to noise."""

    @property
    def feather(self) -> int:
        """Pixels over which what is drawn fades into the picture."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """Sizes in pixels.

    Attributes:
        picture: (height, width, 3), what is drawn over; None is a blank canvas.
        mask: (height, width), where it is drawn over; None is everywhere.
        strength: 0..1, how much of the picture is given up to noise.
        feather: pixels over which what is drawn fades into the picture.
        references: each (h, w, 3) in a size of its own, what a model that edits goes by.
    """

    height: int
    width: int
    picture: NDArray[np.uint8] | None = None
    mask: Mask | None = None
    strength: float = 1.0
    feather: int = 0
    references: tuple[NDArray[np.uint8], ...] = ()

    @classmethod
    def open(cls, manifest: Manifest, request: Pictured) -> Self:
        """The canvas of a resolved request.

        Raises:
            InputError: a size does not fit the model, or a picture cannot be read.
        """
        factor = manifest.vae.downscale
        references = tuple(fit_reference(own, factor) for own in request.references)
        if request.image is None:
            given = (request.height, request.width)
            own = references[0].shape if references else (0, 0)
            height, width = (side if asked is None else asked for asked, side in zip(given, own, strict=False))
            return cls(
                height=_size("height", height, factor), width=_size("width", width, factor), references=references
            )
        picture = open_picture(request.image)
        _check_own_size(picture.size, request.height, request.width, factor)
        height = _size(
            "height", picture.height // factor * factor if request.height is None else request.height, factor
        )
        width = _size("width", picture.width // factor * factor if request.width is None else request.width, factor)
        mask = (
            None if request.mask_image is None else fit_mask(open_mask(request.mask_image), picture.size, width, height)
        )
        assert request.strength is not None
        return cls(
            height=height,
            width=width,
            picture=np.asarray(fit_image(picture, width, height)),
            mask=mask,
            strength=request.strength,
            feather=request.feather,
            references=references,
        )

    def pixels(self, *, masked: bool = False) -> Array:
        """The picture as an autoencoder takes it, (3, height, width) in -1..1; ``masked`` is grey where it is drawn."""
        assert self.picture is not None
        pixels = to_pixels(self.picture)
        if masked and self.mask is not None:
            pixels[:, self.mask] = 0
        return pixels

    def finish(self, drawn: Array) -> Array:
        """What was drawn, (height, width, 3) in 0..1, with the picture around it where there is a mask."""
        if self.picture is None or self.mask is None:
            return drawn
        return paste(drawn, self.picture, self.mask, self.feather)


def to_pixels(picture: NDArray[np.uint8]) -> Array:
    """A picture (height, width, 3) as an autoencoder takes it, (3, height, width) in -1..1."""
    pixels: Array = picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    return pixels


def default_strength(mask_image: Source | None) -> float:
    """How much of a picture is given up where nobody says: as in diffusers."""
    return 0.8 if mask_image is None else 1.0


def _check_own_size(size: tuple[int, int], height: int | None, width: int | None, factor: int) -> None:
    """Raises InputError where the picture's own size (width, height) cannot be drawn, and no other is given."""
    for pixels, given in zip(size, (width, height), strict=True):
        if given is None and not factor <= pixels <= MAX_SIZE:
            raise InputError(
                f"the picture has {size[0]}x{size[1]} pixels, and this model draws {factor}x{factor} to "
                f"{MAX_SIZE}x{MAX_SIZE}; give height and width, or another picture"
            )


def _size(name: str, value: int, factor: int) -> int:
    # The UNet halves its latents once a level; sizes that do not divide still work, by its own rounding.
    whole(name, value)
    if value < factor or value % factor:
        nearest = max(factor, round(value / factor) * factor)
        raise InputError(f"{name}={quoted(value)} is not a positive multiple of {factor}; use {quoted(nearest)}")
    if value > MAX_SIZE:
        raise InputError(f"{name}={quoted(value)} is more than {MAX_SIZE} pixels; use a smaller one")
    return int(value)
