"""Modes that compute less: fewer steps, cached features, guidance in an interval; their operations are counted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.operations import unet_operations
from benchmarks.quality.drawing import FLOAT16, Draw, Drawing
from benchmarks.quality.rounded import rounded
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import Session, Sizes
from training.config import TALBOT

NEVER = 1e9  # a noise level that is never reached


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to draw; ``share`` is that of the exact picture's steps."""

    acceleration: Acceleration = EXACT
    share: float = 1.0


MODES = {
    "exact": Mode(),
    **{f"cache {n}": Mode(acceleration=Acceleration(cache_interval=n)) for n in (2, 3, 5)},
    **{
        f"guidance {low:g} to {high:g}": Mode(acceleration=Acceleration(guidance_interval=(low, high)))
        for low, high in ((0, 20), (0, 10), (0, 5), (0.3, NEVER), (1, NEVER))
    },
    **{f"{share:.0%} of the steps": Mode(share=share) for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)},
    "cache 2, guidance 0 to 20": Mode(acceleration=Acceleration(cache_interval=2, guidance_interval=(0, 20))),
    **{
        f"{share:.0%} of the steps, guidance 0 to {high}": Mode(
            acceleration=Acceleration(guidance_interval=(0, high)), share=share
        )
        for share in (0.4, 0.5, 0.6)
        for high in (20, 10)
    },
    "60% of the steps, cache 2": Mode(acceleration=Acceleration(cache_interval=2), share=0.6),
    "cache 3, guidance 0 to 10": Mode(acceleration=Acceleration(cache_interval=3, guidance_interval=(0, 10))),
    "fast": Mode(acceleration=FAST, share=FAST.steps),
}
NAMES = (*MODES, FLOAT16)


class Counted:
    """A session that counts the operations of its runs; ``operations`` are those of a row."""

    total = 0.0

    def __init__(self, session: Session, operations: float) -> None:
        self._session, self._operations = session, operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, sizes: Sizes) -> None:
        """Run, and add what it took to the total of all sessions."""
        self._session.run(sizes)
        Counted.total += sizes["rows"] * self._operations


def opened(stack: contextlib.ExitStack, names: Sequence[str], steps: int) -> dict[str, Draw]:
    """See :class:`benchmarks.quality.drawing.ModeSet`."""
    modes = {name: MODES[name] for name in names if name != FLOAT16}
    pipeline = stack.enter_context(Pipeline.load("talbot", "cpu"))
    count_operations(pipeline, [mode.acceleration for mode in modes.values()])
    draws: dict[str, Draw] = {name: functools.partial(_draw, pipeline, mode, steps) for name, mode in modes.items()}
    if FLOAT16 in names:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        half = stack.enter_context(Pipeline(rounded(folder), "cpu"))
        draws[FLOAT16] = lambda prompt, seed: Drawing(half(prompt, seed=seed, num_inference_steps=steps))
    return draws


def _draw(pipeline: Pipeline, mode: Mode, steps: int, prompt: str, seed: int) -> Drawing:
    before, count = Counted.total, max(1, round(steps * mode.share))
    output = pipeline(prompt, seed=seed, num_inference_steps=count, fast=mode.acceleration)
    return Drawing(output, Counted.total - before)


def count_operations(pipeline: Pipeline, accelerations: Iterable[Acceleration]) -> None:
    """Let every network of talbot's UNet that these take count; the one in int8 makes what the whole one does."""
    for acceleration in accelerations:
        pipeline("a", fast=acceleration, num_inference_steps=2)  # opens them
    counts = unet_operations(TALBOT.unet, 16, 32)
    for key, session in pipeline.networks.sessions.items():
        if key[0] in counts:
            pipeline.networks.sessions[key] = Counted(session, counts[key[0]])
