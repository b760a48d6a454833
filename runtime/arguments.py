"""Checks of a call's arguments; each raises InputError with the value, what is valid, and the way out."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calotype.runtime.errors import InputError, quoted

T = TypeVar("T")

SEEDS = 2**64
MOST_PICTURES = 10_000  # of one call
MOST_NUMBERS = 10_000  # of one list
MOST_CHARACTERS = 20_000  # of one prompt; what encoders take of English is 6,000
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))  # with thousands, each waiting in a loop, a run never ends


def whole(name: str, value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name}={quoted(value)} is not a whole number")
    if abs(int(value)) > SEEDS:  # no float and no message holds some of those
        raise InputError(f"{name}={quoted(value)} is more than 64 bits hold")
    return int(value)


def finite(name: str, value: Any) -> float:
    """A finite number."""
    number = math.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of a whole number that no float holds
            number = float(value)
    if not math.isfinite(number):
        raise InputError(f"{name}={quoted(value)} is not a finite number")
    return number


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``, both included."""
    number = finite(name, value)
    if not low <= number <= high:
        raise InputError(f"{name}={quoted(value)} is outside {low:g}..{high:g}; use {min(max(number, low), high):g}")
    return number


def at_least(name: str, value: Any, low: int) -> int:
    """A whole number, ``low`` or more."""
    if whole(name, value) < low:
        raise InputError(f"{name}={quoted(value)} is less than {low}; use {low} or more")
    return int(value)


def between(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    if not low <= whole(name, value) <= high:
        raise InputError(f"{name}={quoted(value)} is outside {low}..{high}; use {min(max(int(value), low), high)}")
    return int(value)


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """Two whole numbers (height, width), each ``low`` or more."""
    if not listed(value) or len(value) != 2:
        raise InputError(f"{name}={quoted(value)} is not a pair; give (height, width)")
    return at_least(name, value[0], low), at_least(name, value[1], low)


def seed(name: str, value: Any) -> int:
    """A seed, 0..2⁶⁴-1."""
    if not 0 <= whole(name, value) < SEEDS:
        raise InputError(f"{name}={quoted(value)} is outside 0..2**64-1")
    return int(value)


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{name}={quoted(value)} is of type {kind}; give a text, which may be empty")
    return str(value)


def prompt(name: str, value: Any) -> str:
    """A prompt: a text of up to ``MOST_CHARACTERS``, so that nothing reads a longer one."""
    found = text(name, value)
    if len(found) > MOST_CHARACTERS:
        raise InputError(f"{name} has {len(found)} characters; valid: up to {MOST_CHARACTERS}; shorten it")
    return found


def switch(name: str, value: Any) -> bool:
    """True or False; None is False."""
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}={quoted(value)} is neither True nor False")
    return value is True


def listed(value: Any) -> bool:
    """Whether a value is several, in an order: a list, a tuple, an array, but no text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def instance(name: str, value: Any, kind: type[T], example: str) -> T:
    """A value of one class."""
    if not isinstance(value, kind):
        raise InputError(f"{name}={quoted(value)} is of type {type(value).__name__}; give {example}")
    return value


def instances(name: str, value: Any, kind: type[T], example: str) -> tuple[T, ...]:
    """A list of values of one class; None is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
        raise InputError(f"{name}={quoted(value)} is no list of {kind.__name__} values; give {example}")
    return tuple(value)


def as_path(name: str, value: Any) -> Path:
    """A file's or a folder's path."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise InputError(f"{name}={quoted(value)} is not a path; give a file's or a folder's")
    return Path(value)


def as_paths(name: str, value: Any) -> dict[str, Path]:
    """Paths by names; None is none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(own, str) and own for own in value):
        raise InputError(f"{name}={quoted(value)} is not paths by names; give {{name: path}}")
    return {own: as_path(f"{name}[{quoted(own)}]", path) for own, path in value.items()}


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """A list of finite numbers."""
    if not listed(value) or not len(value):
        raise InputError(f"{name}={quoted(value)} is not a list of finite numbers")
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise InputError(f"{name} has the shape {value.shape}; give a list of finite numbers")
    if len(value) > MOST_NUMBERS:
        raise InputError(f"{name} has {len(value)} numbers; valid: up to {MOST_NUMBERS}")
    return tuple(finite(name, item) for item in value)


def levels(name: str, value: Any) -> tuple[float, float]:
    """Two noise levels, a lower and a higher one."""
    if not listed(value) or len(value) != 2:
        raise InputError(f"{name}={quoted(value)} is not a pair of noise levels; use 0 <= low < high")
    return finite(name, value[0]), finite(name, value[1])


def each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of ``count`` pictures, from one for all or a list of as many; ``name`` is their plural."""
    if not listed(value):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{len(value)} {name} for {count} image(s); give one, or one for each image")
    return list(value)


def prompts(prompt: Any, negative: Any, images: int | None) -> tuple[list[Any], list[Any]]:
    """Prompt and negative prompt of each picture of a call."""
    images = 1 if images is None else at_least("num_images_per_prompt", images, 1)
    if prompt is None:
        raise InputError("prompt is None; give a text, which may be empty")
    given = prompt if listed(prompt) else [prompt]
    if not len(given):
        raise InputError("the list of prompts is empty; give one or more texts, which may be empty")
    if len(given) * images > MOST_PICTURES:
        raise InputError(
            f"{quoted(len(given) * images)} pictures in one call are more than {MOST_PICTURES}; make several calls"
        )
    others = negative if listed(negative) else [negative] * len(given)
    if len(others) != len(given):
        raise InputError(f"{len(others)} negative prompts for {len(given)} prompts; give one, or one for each")
    texts, negatives = list(given), list(others)
    return [own for own in texts for _ in range(images)], [own for own in negatives for _ in range(images)]


def seeds(first: Any, count: int) -> list[int]:
    """Consecutive seeds from ``first`` on; None picks a random one."""
    start = secrets.randbelow(2**32) if first is None else whole("seed", first)
    if not 0 <= start <= SEEDS - count:
        raise InputError(f"seed={quoted(start)} is outside 0..2**64-1 for {count} image(s)")
    return [start + index for index in range(count)]
