"""What a request says of one ControlNet or T2I-Adapter: which, with which picture, how much of it and when."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from calotype.runtime import arguments
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.control_pictures import PREPROCESSORS, RESIZES, parse_preprocessor
from calotype.runtime.pictures.reading import Source, picture_source

MOST_CONTROLS = 8  # of one picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """One ControlNet or T2I-Adapter of a request.

    Attributes:
        model: the name that the pipeline was given it by, or a path, the folder of its bundle.
        image: the control picture, as a request's picture is given; None is the picture to start from.
        scale: what its residuals or features are multiplied by.
        start: 0..1, the share of the steps before it sets in.
        end: 0..1, the share of the steps after which it is over.
        guess: whether it acts on the row with the prompt alone, and less on what lies further out; with it the
            picture is followed without a prompt, too.
        preprocess: what the control picture is made into first, ``"canny"`` or ``"canny-50-150"``, say; see
            :func:`calotype.runtime.pictures.control_pictures.parse_preprocessor`. None takes it as it is.
        resize: how a picture of another size is fitted; see
            :data:`calotype.runtime.pictures.control_pictures.RESIZES`.
        mode: of which kind the picture is, where the ControlNet takes several (union, ProMax): a name or a number; see
            :data:`calotype.runtime.control_modes.MODES`. None is the kind that ``model`` is named by.

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
    mode: str | int | None = None

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
        if self.preprocess is not None:
            parse_preprocessor(self.preprocess)
        if not isinstance(self.resize, str) or self.resize not in RESIZES:
            raise InputError(f"a control's resize={quoted(self.resize)} is not known; valid: {', '.join(RESIZES)}")
        if self.mode is not None and (isinstance(self.mode, bool) or not isinstance(self.mode, str | int)):
            raise InputError(f"a control's mode={quoted(self.mode)} is no name and no number; give one of them")

    def evaluations(self, first: int, count: int) -> range:
        """In which of a schedule's ``count`` evaluations it acts, of a job that begins with ``first``; as diffusers."""
        left = max(count - first, 1)
        acting = [index for index in range(left) if not (index / left < self.start or (index + 1) / left > self.end)]
        return range(first + acting[0], first + acting[-1] + 1) if acting else range(0)

    @classmethod
    def parse(cls, text: str) -> tuple[str, Path, Self]:
        """Read ``NAME=BUNDLE:PICTURE[:SCALE[:START:END]]``, as the command line has it.

        ``PICTURE`` can be ``WORDS@PICTURE``, where the words, with commas between them, are a preprocessor, a way to
        resize, or both, as in ``canny-50-150,pad@photo.jpg``; an empty picture is the picture to start from.

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
        words, at, picture = parts[1].rpartition("@")
        prepare = _prepare(words.split(",")) if at else {}
        control = cls(
            model=name,
            image=Path(picture) if picture else None,
            scale=scale,
            start=start,
            end=end,
            preprocess=prepare.get("preprocess"),
            resize=prepare.get("resize", "crop"),
        )
        return name, Path(parts[0]), control


def _prepare(words: Sequence[str]) -> dict[str, str]:
    """The preprocessor and the way to resize that stand before a picture."""
    found: dict[str, str] = {}
    for word in words:
        kind = "resize" if word in RESIZES else "preprocess"
        if kind in found or (kind == "preprocess" and word.split("-")[0] not in PREPROCESSORS):
            known = ", ".join([*PREPROCESSORS, *RESIZES])
            raise InputError(
                f"{quoted(','.join(words))} before a control's picture cannot be read; valid is one of each, with a "
                f"comma between them: {known}"
            )
        found[kind] = word
    return found


def checked_controls(name: str, value: object) -> tuple[Control, ...]:
    """The controls of a request; raises InputError where they are none, or too many."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, Control) for item in value):
        raise InputError(f"{name}={quoted(value)} is no list of controls; give [Control(model=…, image=…)]")
    if len(value) > MOST_CONTROLS:
        raise InputError(f"{len(value)} controls are more than the {MOST_CONTROLS} that one picture takes; use fewer")
    return tuple(value)
