"""Checks of a call's arguments; each raises InputError with the value, what is valid, and the way out."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from calotype.runtime.errors import InputError

SEEDS = 2**64


def whole(name: str, value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name}={value!r} is not a whole number")
    return int(value)


def finite(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise InputError(f"{name}={value!r} is not a finite number")
    return float(value)


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``, both included."""
    number = finite(name, value)
    if not low <= number <= high:
        raise InputError(f"{name}={value!r} is outside {low:g}..{high:g}; use {min(max(number, low), high):g}")
    return number


def at_least(name: str, value: Any, low: int) -> int:
    """A whole number, ``low`` or more."""
    if whole(name, value) < low:
        raise InputError(f"{name}={value} is less than {low}; use {low} or more")
    return int(value)


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """Two whole numbers (height, width), each ``low`` or more."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(f"{name}={value!r} is not a pair; give (height, width)")
    return at_least(name, value[0], low), at_least(name, value[1], low)


def prompts(prompt: str | Sequence[str], negative: str | Sequence[str], images: int) -> tuple[list[str], list[str]]:
    """Prompt and negative prompt of each image."""
    at_least("num_images_per_prompt", images, 1)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise InputError("there is no prompt; an empty string is one")
    negatives = [negative] * len(texts) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(texts):
        raise InputError(f"{len(negatives)} negative prompts for {len(texts)} prompts; give one, or one for each")
    return [text for text in texts for _ in range(images)], [text for text in negatives for _ in range(images)]


def seeds(seed: int | None, count: int) -> list[int]:
    """Consecutive seeds from ``seed`` on; None picks a random one."""
    first = secrets.randbelow(2**32) if seed is None else whole("seed", seed)
    if not 0 <= first <= SEEDS - count:
        raise InputError(f"seed={first} is outside 0..2**64-1 for {count} image(s)")
    return [first + index for index in range(count)]
