"""Checks of a call's arguments; each raises InputError with the value, what is valid, and the way out."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from calotype.runtime.errors import InputError, quoted

SEEDS = 2**64
MOST_PICTURES = 10_000  # of one call


def whole(name: str, value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name}={quoted(value)} is not a whole number")
    return int(value)


def finite(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise InputError(f"{name}={quoted(value)} is not a finite number")
    return float(value)


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``, both included."""
    number = finite(name, value)
    if not low <= number <= high:
        raise InputError(f"{name}={quoted(value)} is outside {low:g}..{high:g}; use {min(max(number, low), high):g}")
    return number


def at_least(name: str, value: Any, low: int) -> int:
    """A whole number, ``low`` or more."""
    if whole(name, value) < low:
        raise InputError(f"{name}={value} is less than {low}; use {low} or more")
    return int(value)


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """Two whole numbers (height, width), each ``low`` or more."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(f"{name}={quoted(value)} is not a pair; give (height, width)")
    return at_least(name, value[0], low), at_least(name, value[1], low)


def seed(name: str, value: Any) -> int:
    """A seed, 0..2⁶⁴-1."""
    if not 0 <= whole(name, value) < SEEDS:
        raise InputError(f"{name}={value} is outside 0..2**64-1")
    return int(value)


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise InputError(f"{name}={quoted(value)} is a {type(value).__name__}, not a text; an empty string is one")
    return str(value)


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """A list of finite numbers."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray) or not len(value):
        raise InputError(f"{name}={quoted(value)} is not a list of finite numbers")
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise InputError(f"{name} has the shape {value.shape}; give a list of finite numbers")
    return tuple(finite(name, item) for item in value)


def levels(name: str, value: Any) -> tuple[float, float]:
    """Two noise levels, a lower and a higher one."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray) or len(value) != 2:
        raise InputError(f"{name}={quoted(value)} is not a pair of noise levels; use 0 <= low < high")
    return finite(name, value[0]), finite(name, value[1])


def each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of ``count`` pictures, from one for all or a list of as many; ``name`` is their plural."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{len(value)} {name} for {count} image(s); give one, or one for each image")
    return list(value)


def prompts(prompt: Any, negative: Any, images: int | None) -> tuple[list[Any], list[Any]]:
    """Prompt and negative prompt of each picture of a call."""
    images = 1 if images is None else at_least("num_images_per_prompt", images, 1)
    if prompt is None:
        raise InputError("prompt is None; give a text, an empty string is one")
    texts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) else [prompt]
    if not texts:
        raise InputError("there is no prompt; an empty string is one")
    if len(texts) * images > MOST_PICTURES:
        raise InputError(
            f"{len(texts) * images} pictures in one call are more than {MOST_PICTURES}; make several calls"
        )
    listed = isinstance(negative, Sequence) and not isinstance(negative, str | bytes)
    negatives = list(negative) if listed else [negative] * len(texts)
    if len(negatives) != len(texts):
        raise InputError(f"{len(negatives)} negative prompts for {len(texts)} prompts; give one, or one for each")
    return [own for own in texts for _ in range(images)], [own for own in negatives for _ in range(images)]


def seeds(first: Any, count: int) -> list[int]:
    """Consecutive seeds from ``first`` on; None picks a random one."""
    start = secrets.randbelow(2**32) if first is None else whole("seed", first)
    if not 0 <= start <= SEEDS - count:
        raise InputError(f"seed={start} is outside 0..2**64-1 for {count} image(s)")
    return [start + index for index in range(count)]
