"""What a run on a GPU measures: one model on one backend, and the names of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from calotype.runtime.bundle.folder import BUNDLED

MODELS = ("talbot", "sd1", "sdxl")
STEPS = {"talbot": 20, "sd1": 50, "sdxl": 30}
ROUNDS, REPEATS, WARM_UP, SEED = 20, 5, 3, 0
IMAGES = (1, 2, 4, 8)

# By name, what measures it: a call without arguments whose value goes into the results.
Parts = Mapping[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One model on one backend.

    Attributes:
        model: a name in ``MODELS``.
        backend: one of the runtime's, ``"pytorch"``, ``"diffusers"``, or ``"model"``, which makes the model alone.
        work: the folder where models that are made lie.
        rounds: runs that a median is taken of.
        steps: denoising steps of a picture; None takes the model's in ``STEPS``.
        images: pictures of a call, of which each number is measured.
        repeats: how often the same picture is drawn again.
        parts: the names of the parts to measure; without any, all are measured.
    """

    model: str
    backend: str
    work: Path
    rounds: int = ROUNDS
    steps: int | None = None
    images: tuple[int, ...] = IMAGES
    repeats: int = REPEATS
    parts: tuple[str, ...] = ()

    def bundle(self) -> Path:
        """The folder of the model's bundle, which is made where it is not there yet."""
        if self.model == "talbot":
            return BUNDLED / self.model
        from benchmarks.checkpoints import model  # PyTorch is needed to make one

        return model(self.model, self.work).bundle


class NotRunError(Exception):
    """A part cannot be measured here; the message says why."""
