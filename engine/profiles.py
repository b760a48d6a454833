"""Optimization profiles: the shapes a plan takes, said in UNet rows and pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import InputError

MOST_CHUNKS = 4  # of a long prompt
CLIP_TOKENS = 77  # of a chunk, in bundles without a tokenizer of their own
MOST_EXTRA = 64  # rows that textual inversion adds to the token table
MOST_CONTROLS = 8  # pictures of a ControlNet for several kinds
MOST_VECTORS = 64  # of textual inversion
SYMBOLS = ("batch", "height", "width")
MOST_ADAPTERS = 4  # of one picture
MOST_IMAGE_TOKENS = 64  # of one adapter: sixteen pictures of a plain one, four of Plus
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The least size, the one to tune for, and the largest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"the range {self} does not rise; valid: MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"512"`` or ``"256:512:768"``; raises InputError for anything else."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdecimal() for part in parts):
            raise InputError(f"the range {text!r} cannot be read; valid: SIZE or MIN:OPT:MAX, as in 512:512:1024")
        numbers = [int(part) for part in parts]
        return cls(min=numbers[0], opt=numbers[len(numbers) // 2], max=numbers[-1])

    def divided(self, divisor: int, what: str) -> Range:
        """Pixels to latents; raises InputError where one is no multiple of ``divisor``."""
        for pixels in (self.min, self.opt, self.max):
            if pixels % divisor:
                near = max(1, round(pixels / divisor)) * divisor
                raise InputError(f"{what}={pixels} is not a multiple of {divisor}; the nearest that is: {near}")
        return Range(min=self.min // divisor, opt=self.opt // divisor, max=self.max // divisor)


ONE = Range(min=1, opt=1, max=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One profile; ``batch`` counts UNet rows (two a guided image), ``height`` and ``width`` pixels."""

    name: str
    batch: Range
    height: Range
    width: Range

    @classmethod
    def parse(cls, text: str, base: Profile) -> Profile:
        """Read ``"portrait,batch=1:2:4,height=768,width=512"``; what it does not say is as in ``base``.

        Raises:
            InputError: it cannot be read.
        """
        name, *parts = text.split(",")
        ranges: dict[str, Any] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if key not in SYMBOLS or not equals or key in ranges:
                raise InputError(
                    f"{part!r} in the profile {text!r} cannot be read; valid: NAME,batch=RANGE,height=RANGE,width=RANGE"
                )
            ranges[key] = Range.parse(value)
        if not name.isidentifier():
            raise InputError(f"the profile {text!r} has no name; valid: NAME,batch=RANGE,height=RANGE,width=RANGE")
        return dataclasses.replace(base, name=name, **ranges)

    def to_json(self) -> dict[str, str]:
        """Its ranges as text."""
        return {"name": self.name, "batch": str(self.batch), "height": str(self.height), "width": str(self.width)}


def default_profile(manifest: Manifest, *, static: bool = False) -> Profile:
    """One to four guided images, from half to one and a half times the model's own size; ``static``: one, at it."""
    unit = manifest.vae.downscale * 8  # a UNet halves its input up to three times

    def sizes(pixels: int) -> Range:
        least = max(unit, pixels // 2 // unit * unit)
        return Range(min=min(least, pixels), opt=pixels, max=max(pixels, pixels * 3 // 2 // unit * unit))

    height, width = manifest.defaults.height, manifest.defaults.width
    if static:
        return Profile(
            name="static", batch=Range.parse("2"), height=Range.parse(str(height)), width=Range.parse(str(width))
        )
    return Profile(name="default", batch=Range(min=1, opt=2, max=8), height=sizes(height), width=sizes(width))


def choose_profiles(
    manifest: Manifest, *, batch: str | None, height: str | None, width: str | None, extra: Sequence[str], static: bool
) -> list[Profile]:
    """The default profile, with ranges of its own where they are given, and ``extra`` ones in one word each.

    Raises:
        InputError: one cannot be read.
    """
    given = {"batch": batch, "height": height, "width": width}
    ranges: dict[str, Any] = {name: Range.parse(text) for name, text in given.items() if text is not None}
    first = dataclasses.replace(default_profile(manifest, static=static), **ranges)
    return [first, *(Profile.parse(text, first) for text in extra)]


def check_profiles(profiles: Sequence[Profile]) -> None:
    """Raises InputError when there is none, or two have one name or one content."""
    if not profiles:
        raise InputError("a plan needs at least one profile; leave the option out for the default one")
    names = [profile.name for profile in profiles]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two profiles are named {name!r}; give each its own name")
    for index, profile in enumerate(profiles):
        for other in profiles[:index]:
            if dataclasses.replace(profile, name=other.name) == other:
                raise InputError(f"the profiles {other.name!r} and {profile.name!r} are the same; drop one")


def network_shapes(profile: Profile, spec: ModelSpec, manifest: Manifest) -> Shapes:
    """Input name -> its (min, opt, max) shapes.

    Raises:
        InputError: a size is no multiple of the model's downscale, or the graph has a symbol no profile speaks of.
    """
    length = max((tokenizer.max_length for tokenizer in manifest.tokenizers.values()), default=CLIP_TOKENS)
    one_shape = all(item.min == item.max for item in (profile.batch, profile.height, profile.width))
    ranges = {
        "rows": profile.batch,
        # A prompt is encoded alone and a picture decoded alone, so that neither depends on what is beside it; and
        # an autoencoder's activations, the largest of all, are kept for one picture only.
        "batch": ONE,
        "pictures": Range(min=1, opt=1, max=1 if one_shape else MOST_CONTROLS),
        "extra": Range(min=1, opt=1, max=1 if one_shape else MOST_EXTRA),
        "height": profile.height.divided(manifest.vae.downscale, "height"),
        "width": profile.width.divided(manifest.vae.downscale, "width"),
        "tokens": Range(min=length, opt=length, max=length if one_shape else length * MOST_CHUNKS),
        "adapters": Range(min=1, opt=1, max=MOST_ADAPTERS),
        "image_tokens": Range(min=1, opt=16, max=MOST_IMAGE_TOKENS),
    }
    shapes: Shapes = {}
    for tensor in spec.inputs:
        unknown = tensor.symbols - ranges.keys()
        if unknown:
            raise InputError(
                f"input {tensor.name!r} depends on {', '.join(sorted(unknown))}, which no profile sets; "
                f"valid: {', '.join(ranges)}"
            )
        bounds: list[tuple[int, ...]] = []
        for bound in ("min", "opt", "max"):
            sizes: dict[str, Any] = {symbol: getattr(ranges[symbol], bound) for symbol in tensor.symbols}
            bounds.append(tensor.resolve(sizes))
        shapes[tensor.name] = (bounds[0], bounds[1], bounds[2])
    return shapes
