"""A picture that a mode has drawn, and what a set of modes is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from calotype.runtime.pipeline import Output

EXACT, FLOAT16 = "exact", "float16"


class Drawing(NamedTuple):
    """A picture with its timings, and the operations of the UNet for it where they were counted."""

    output: Output
    operations: float | None = None


Draw = Callable[[str, int], Drawing]  # of a prompt and a seed


class ModeSet(Protocol):
    """A module of modes: their names, the exact one among them, and what opens them."""

    NAMES: Sequence[str]

    def opened(self, stack: contextlib.ExitStack, names: Sequence[str], steps: int) -> dict[str, Draw]:
        """What draws in each of these modes; the exact one takes ``steps``, and everything closes with ``stack``."""
