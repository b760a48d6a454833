"""How the time grows with pixels, steps and batch: ``python -m benchmarks.growth``. Writes ``results/growth-…``.

One of the three is changed at a time, the others stay as they are in the first setting, which is the model's own or is
given, and all settings take turns round by round. Engines are built beforehand.
With them, the host's own share of a step, from an engine that answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from benchmarks import speed
from benchmarks.checkpoints import MODELS, model
from benchmarks.environments import WORK
from benchmarks.machine import RESULTS, machine, origin
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.diagnostics.benchmark import PROMPT, host_overhead
from calotype.runtime.pipeline import Pipeline


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, default="talbot")
    parser.add_argument("--size", type=int, nargs="*", default=[256], help="pixels of a side, beside the first")
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 10, 40], help="beside the first")
    parser.add_argument("--images", type=int, nargs="*", default=[2, 4, 8], help="in a call, beside one")
    parser.add_argument("--first", type=int, nargs=2, metavar=("SIZE", "STEPS"), help="default: the model's own")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    chosen = model(arguments.model, WORK / "benchmarks")
    os.environ["CALOTYPE_CACHE"] = str(WORK / "engines")
    build_engines(Bundle.open(chosen.bundle), say=print)
    report = {
        **origin(" ".join(["python -m benchmarks.growth", *sys.argv[1:]])),
        "machine": machine(),
        "rounds": arguments.rounds,
    }
    with Pipeline.load(chosen.bundle, "cpu") as pipeline:
        defaults = pipeline.manifest.defaults
        size, steps = arguments.first or (defaults.height, defaults.num_inference_steps)
        first = {"size": size, "steps": steps, "images": 1}
        report["rows"] = measure(
            pipeline,
            [
                first,
                *({**first, "size": size} for size in arguments.size),
                *({**first, "steps": steps} for steps in arguments.steps),
                *({**first, "images": images} for images in arguments.images),
            ],
            arguments.rounds,
        )
    report["host"] = [
        {"latents": f"4x{side}x{side}", "jobs": jobs, **host_overhead(side, jobs=jobs)}
        for side in (64, 128)
        for jobs in (1, 8)
    ]
    print(json.dumps(report, indent=2))
    (RESULTS / f"growth-{chosen.name}.json").write_text(json.dumps(report, indent=2) + "\n")


def measure(pipeline: Pipeline, settings: list[dict[str, int]], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each setting's call, and what they are of the first's."""
    seconds: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds + 1):  # the first prepares, and is not counted
        for setting, taken in zip(settings, seconds, strict=True):
            begin = time.perf_counter()
            pipeline(
                PROMPT,
                height=setting["size"],
                width=setting["size"],
                num_inference_steps=setting["steps"],
                num_images_per_prompt=setting["images"],
                seed=0,
            )
            taken.append(time.perf_counter() - begin)
    return [
        {
            **setting,
            "call_s": speed.spread(taken[1:], 3),
            "ratio": speed.spread([own / first for own, first in zip(taken[1:], seconds[0][1:], strict=True)], 2),
        }
        for setting, taken in zip(settings, seconds, strict=True)
    ]


if __name__ == "__main__":
    main()
