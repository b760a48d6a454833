"""Modes in eight-bit integers, with fewer steps, and in float16."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from benchmarks.quality.drawing import FLOAT16, Draw, Drawing
from benchmarks.quality.rounded import rounded
from calotype.engine import int8
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.pipeline import Pipeline

INT8 = Acceleration(precision="int8")
PRODUCTS, ALL = ("MatMul",), ("Conv", "MatMul")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to draw.

    Attributes:
        operators: those of the UNet that are in int8.
        share: that of the exact picture's steps.
    """

    operators: tuple[str, ...] = ()
    share: float = 1.0


MODES = {
    "exact": Mode(),
    "MatMul in int8": Mode(operators=PRODUCTS),
    "Conv and MatMul in int8": Mode(operators=ALL),
    **{
        f"{share:.0%} of the steps{where}": Mode(operators=operators, share=share)
        for share in (FAST.steps, 0.5)
        for where, operators in (("", ()), (" in int8", ALL))
    },
    FLOAT16: Mode(),
}
NAMES = tuple(MODES)


def opened(stack: contextlib.ExitStack, names: Sequence[str], steps: int) -> dict[str, Draw]:
    """See :class:`benchmarks.quality.drawing.ModeSet`. Modes of the same networks share a pipeline."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    pipelines: dict[tuple[str, ...], Pipeline] = {}
    draws: dict[str, Draw] = {}
    for name in names:
        mode = MODES[name]
        key = (FLOAT16,) if name == FLOAT16 else mode.operators
        if key not in pipelines:
            pipelines[key] = stack.enter_context(_pipeline(folder / str(len(pipelines)), key))
        draws[name] = functools.partial(_draw, pipelines[key], max(1, round(steps * mode.share)))
    return draws


def _pipeline(folder: Path, key: tuple[str, ...]) -> Pipeline:
    """Talbot with its engines, if any, in ``folder``, opened."""
    folder.mkdir()
    with mock.patch.dict(os.environ, CALOTYPE_CACHE=str(folder / "engines")):
        if key == (FLOAT16,):
            pipeline = Pipeline(rounded(folder / "bundle"), "cpu")
        else:
            if key:
                with mock.patch.object(int8, "OPERATORS", key):
                    build_engines(Bundle.open("talbot"), precision="int8")
            pipeline = Pipeline.load("talbot", "cpu", fast=INT8 if key else EXACT)
        pipeline("a", num_inference_steps=1)  # opens what is opened when it is first used
    return pipeline


def _draw(pipeline: Pipeline, steps: int, prompt: str, seed: int) -> Drawing:
    return Drawing(pipeline(prompt, seed=seed, num_inference_steps=steps))
