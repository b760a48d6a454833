"""What a request says of one ControlNet: which, with which picture, how much of it and when."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Self

from calotype.runtime import arguments
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.control_pictures import PREPROCESSORS, RESIZES
from calotype.runtime.pictures.reading import Source, picture_source

MOST_CONTROLS = 8  # of one picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """One ControlNet of a request.

    Attributes:
        model: the name that the pipeline was given it by, or a path, the folder of its bundle.
        image: the control picture, as a request's picture is given; None is the picture to start from.
        scale: what its residuals are multiplied by.
        start: 0..1, the share of the steps before it sets in.
        end: 0..1, the share of the steps after which it is over.
        guess: whether it acts on the row with the prompt alone, and less on what lies further out; with it the
            picture is followed without a prompt, too.
        preprocess: what the control picture is made into first; see
            :data:`calotype.runtime.pictures.control_pictures.PREPROCESSORS`. None takes it as it is.
        resize: how a picture of another size is fitted; see
            :data:`calotype.runtime.pictures.control_pictures.RESIZES`.

    Raises:
        InputError: a value is of a wrong type or out of range.
    """

    model: str | Path
    image: Source | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    preprocess: str | None = None
    resize: str = "crop"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path) or not str(self.model):
            raise InputError(f"a control's model={quoted(self.model)} is no name and no path; give one of them")
        for name in ("scale", "start", "end"):
            object.__setattr__(self, name, arguments.finite(f"a control's {name}", getattr(self, name)))
        object.__setattr__(
            self, "image", None if self.image is None else picture_source("a control's image", self.image)
        )
        if not 0 <= self.start < self.end <= 1:
            raise InputError(
                f"a control from {self.start:g} to {self.end:g} is no share of the steps; use 0 <= start < end <= 1"
            )
        if not isinstance(self.guess, bool):
            raise InputError(f"a control's guess={quoted(self.guess)} is not known; use True or False")
        for name, value, valid in (("preprocess", self.preprocess, PREPROCESSORS), ("resize", self.resize, RESIZES)):
            if value is not None and (not isinstance(value, str) or value not in valid):
                raise InputError(f"a control's {name}={quoted(value)} is not known; valid: {', '.join(valid)}")

    def evaluations(self, first: int, count: int) -> range:
        """In which of a schedule's ``count`` evaluations it acts, of a job that begins with ``first``; as diffusers."""
        left = max(count - first, 1)
        acting = [index for index in range(left) if not (index / left < self.start or (index + 1) / left > self.end)]
        return range(first + acting[0], first + acting[-1] + 1) if acting else range(0)

    @classmethod
    def parse(cls, text: str) -> tuple[str, Path, Self]:
        """Read ``NAME=BUNDLE:PICTURE[:SCALE[:START:END]]``, as the command line has it.

        ``PICTURE`` can be ``PREPROCESSOR@PICTURE``; an empty one is the picture to start from.

        Returns:
            The name, the bundle's folder, and the control.

        Raises:
            InputError: it cannot be read, or a value is out of range.
        """
        name, equals, rest = text.partition("=")
        parts = rest.split(":")
        if not equals or not re.fullmatch(r"[\w.-]+", name) or len(parts) not in (2, 3, 5) or not parts[0]:
            raise InputError(
                f"the control {quoted(text)} cannot be read; valid: NAME=BUNDLE:PICTURE[:SCALE[:START:END]], as in "
                "canny=my-control:edges.png:0.8:0:0.6"
            )
        try:
            scale, start, end = (*map(float, parts[2:]), *(1.0, 0.0, 1.0)[len(parts) - 2 :])
        except ValueError:
            raise InputError(f"the control {quoted(text)} has no number where one is due") from None
        preprocess, at, picture = parts[1].rpartition("@")
        image = Path(picture) if picture else None
        made = preprocess if at else None
        control = cls(model=name, image=image, scale=scale, start=start, end=end, preprocess=made)
        return name, Path(parts[0]), control


def checked_controls(name: str, value: object) -> tuple[Control, ...]:
    """The controls of a request; raises InputError where they are none, or too many."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, Control) for item in value):
        raise InputError(f"{name}={quoted(value)} is no list of controls; give [Control(model=…, image=…)]")
    if len(value) > MOST_CONTROLS:
        raise InputError(f"{len(value)} controls are more than the {MOST_CONTROLS} that one picture takes; use fewer")
    return tuple(value)
