"""Modes with less attention (:mod:`benchmarks.shortcuts`): talbot's UNet in PyTorch takes its engine's place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

from benchmarks.quality.drawing import Draw, Drawing
from benchmarks.quality.fast_modes import NEVER
from benchmarks.shortcuts import Mode, TorchUNet, first, load
from calotype.runtime.bundle.form import FLOAT32
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions import Session

MODES = {
    "in PyTorch": Mode(),
    **{f"cross-attention kept after {after:.0%}": Mode(after=after) for after in (0.2, 0.4, 0.6)},
    **{f"gated after {after:.0%}": Mode(after=after, gated=True) for after in (0.2, 0.4, 0.6)},
    **{f"{merged:.0%} of the tokens merged": Mode(merged=merged) for merged in (0.25, 0.5, 0.75)},
}
NAMES = ("exact", *MODES)
UNET = SessionKey("unet", FLOAT32)


def opened(stack: contextlib.ExitStack, names: Sequence[str], steps: int) -> dict[str, Draw]:
    """See :class:`benchmarks.quality.drawing.ModeSet`."""
    pipeline = stack.enter_context(Pipeline.load("talbot", "cpu"))
    engine = pipeline.networks.sessions[UNET]
    stand_in = TorchUNet(engine, load())
    stand_in.steps = steps
    stack.callback(pipeline.networks.sessions.__setitem__, UNET, engine)
    draws: dict[str, Draw] = {}
    for name in names:
        if name == "exact":
            draws[name] = functools.partial(_draw, pipeline, engine, steps, None)
        else:
            draws[name] = functools.partial(_draw_with, stand_in, MODES[name], pipeline, steps)
    return draws


def _draw(pipeline: Pipeline, session: Session, steps: int, low: float | None, prompt: str, seed: int) -> Drawing:
    """Draw with ``session`` as the UNet, guided above the noise level ``low``."""
    pipeline.networks.sessions[UNET] = session
    fast = Acceleration(guidance_interval=None if low is None else (low, NEVER))
    return Drawing(pipeline(prompt, seed=seed, num_inference_steps=steps, fast=fast))


def _draw_with(stand_in: TorchUNet, mode: Mode, pipeline: Pipeline, steps: int, prompt: str, seed: int) -> Drawing:
    stand_in.mode = mode
    low = None
    if mode.gated:  # guidance is on above a noise level: that of the first step without
        solver = create_solver(pipeline.manifest.defaults.scheduler, pipeline.manifest.scheduler, steps)
        low = solver.noise_level(first(mode, steps))
    return _draw(pipeline, stand_in, steps, low, prompt, seed)
