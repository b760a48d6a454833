"""How the time grows with pixels, steps and pictures of a call, with engines that are built beforehand.

One of the three is changed at a time, the others stay as they are in the first setting, which is the model's own or is
given; all settings take turns.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator

from benchmarks.checkpoints import MODELS, model
from benchmarks.environments import WORK
from benchmarks.micro.harness import Options, Row
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.diagnostics.benchmark import PROMPT
from calotype.runtime.pipeline import Pipeline


def arguments(parser: argparse.ArgumentParser) -> None:
    """The settings."""
    parser.add_argument("model", nargs="?", choices=MODELS, default="talbot")
    parser.add_argument("--size", type=int, nargs="*", default=[256], help="pixels of a side, beside the first")
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 10, 40], help="beside the first")
    parser.add_argument("--images", type=int, nargs="*", default=[2, 4, 8], help="in a call, beside one")
    parser.add_argument("--first", type=int, nargs=2, metavar=("SIZE", "STEPS"), help="default: the model's own")


def rows(options: Options) -> Iterator[Row]:
    """One row, whose forms are the settings."""
    asked = options.own
    options.about["variant"] = asked.model
    chosen = model(asked.model, WORK / "benchmarks")
    os.environ["CALOTYPE_CACHE"] = str(WORK / "engines")
    build_engines(Bundle.open(chosen.bundle), say=print)
    with Pipeline.load(chosen.bundle, "cpu") as pipeline:
        defaults = pipeline.manifest.defaults
        size, steps = asked.first or (defaults.height, defaults.num_inference_steps)
        settings = [
            (size, steps, 1),
            *((other, steps, 1) for other in asked.size),
            *((size, other, 1) for other in asked.steps),
            *((size, steps, other) for other in asked.images),
        ]
        yield row(pipeline, asked.model, options.some(dict.fromkeys(settings)))


def row(pipeline: Pipeline, name: str, settings: list[tuple[int, int, int]]) -> Row:
    """A call at each of ``settings``: pixels of a side, steps, pictures."""
    forms = {
        f"{size} pixels, {steps} steps, {images} {'picture' if images == 1 else 'pictures'}": functools.partial(
            pipeline,
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            num_images_per_prompt=images,
            seed=0,
        )
        for size, steps, images in settings
    }
    return Row(title=f"a call of {name}", forms=forms)
