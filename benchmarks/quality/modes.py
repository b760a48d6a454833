"""What modes of drawing give and cost on talbot: ``python -m benchmarks.quality.modes SET``, JSON.

The sets are ``fast`` (fewer steps, caching, guidance intervals), ``int8`` (engines in int8, fewer steps, float16) and
``shortcuts`` (less attention, in PyTorch). Talbot draws the prompts of ``pairs.csv``, each in every mode before the
next, at each seed from 0. Of a mode's pictures: PSNR and distance in the features of ``quality`` to the exact ones, and
retrieval; ``top5_change`` is by how many points retrieval differs from the exact pictures', with its standard error.
``time`` and ``operations`` are how many times less the denoising loop took (the median of the ratios within a prompt)
and the UNet computed. ``float16`` is the graphs rounded as a GPU would; its time says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from benchmarks.machine import machine, origin
from benchmarks.quality.distance import change, compare
from benchmarks.quality.drawing import EXACT, FLOAT16, Drawing, ModeSet
from benchmarks.quality.features import features
from benchmarks.quality.retrieval import judge, load_gallery, read_pairs, retrieved
from calotype.runtime.bundle.folder import Bundle
from training import data
from training.config import TALBOT

SETS = {name: f"benchmarks.quality.{name}_modes" for name in ("fast", "int8", "shortcuts")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.modes", description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--steps", type=int, help="of an exact picture; default: the model's own")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of a prompt; default: 1")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the prompts, every N-th; default: all")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="beside exact; default: all of the set")
    options = parser.parse_args(given)
    modes: ModeSet = importlib.import_module(SETS[options.set])  # type: ignore[assignment]
    names = list(dict.fromkeys([EXACT, *(options.modes or modes.NAMES)]))
    unknown = [name for name in names if name not in modes.NAMES]
    if unknown:
        parser.error(f"there is no mode {unknown[0]!r} in {options.set}; valid: {', '.join(modes.NAMES)}")
    about = {
        **origin(f"python -m benchmarks.quality.modes {shlex.join(given)}", "benchmarks", "engine", "runtime"),
        "machine": machine() | {"onnxruntime": onnxruntime.__version__},
    }  # of the code that runs now, hours before it ends
    steps = options.steps or Bundle.open("talbot").manifest.defaults.num_inference_steps
    print(json.dumps(about | measure(modes, names, steps, options.seeds, options.every), indent=2))


def measure(modes: ModeSet, names: Sequence[str], steps: int, seeds: int, every: int) -> dict[str, Any]:
    """The figures of the modes of these names."""
    if not data.data_path(TALBOT).exists():
        data.make(TALBOT)
    gallery = load_gallery(data.load(TALBOT))
    pairs = read_pairs(every)
    drawn: dict[str, list[Drawing]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        draws = modes.opened(stack, names, steps)
        for seed in range(seeds):
            for pair in pairs:
                for name, draw in draws.items():
                    drawn[name].append(draw(f"{pair['name']}, {pair['style']} style", seed))
    pictures = {name: [drawing.output.images[0] for drawing in own] for name, own in drawn.items()}
    hits = {name: retrieved(features(own), gallery, pairs * seeds, 5) for name, own in pictures.items()}
    found = {
        name: compare(pictures[EXACT], pictures[name])
        | costs(name, drawn)
        | judge(pictures[name], gallery, pairs * seeds)
        | {"top5_change": change(hits[EXACT], hits[name], pairs)}
        for name in names
    }
    return {"prompts": len(pairs), "seeds": seeds, "steps": steps, "modes": found}


def costs(name: str, drawn: Mapping[str, Sequence[Drawing]]) -> dict[str, float]:
    """How many times less a mode takes than the exact one, in seconds and, where they were counted, in operations."""
    if name == FLOAT16:
        return {}
    found = {
        "time": round(
            statistics.median(
                exact.output.timings.denoising / own.output.timings.denoising
                for exact, own in zip(drawn[EXACT], drawn[name], strict=True)
            ),
            2,
        )
    }
    counts = {each: [drawing.operations for drawing in drawn[each]] for each in (EXACT, name)}
    if None not in counts[name]:
        exact, own = (sum(count or 0 for count in counts[each]) for each in (EXACT, name))
        found["operations"] = round(exact / own, 2)
    return found


if __name__ == "__main__":
    main()
