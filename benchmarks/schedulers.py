"""Time of a scheduler's step: ``python -m benchmarks.schedulers``. Latents of a 512×512 picture, (4, 64, 64), as JSON.

Each solver takes whole runs of 20 steps, all solvers in turn; a figure is the median of its steps over all rounds.
Ancestral and SDE solvers draw normal numbers: ``drawn`` counts that, ``step`` gives them the numbers for nothing.
The promise is 50 µs for ``step``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.machine import machine, origin
from calotype.runtime.schedulers import SCHEDULERS, create_solver

STEPS = 20
SHAPE = (4, 64, 64)
# The betas of Stable Diffusion, and its own kind of PNDM.
CONFIG: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "clip_sample": False,
}


class NoNoise:
    """Normal numbers that cost nothing: the array stays as it is."""

    def standard_normal(self, *, dtype: Any, out: Any) -> None:
        """Leave ``out``."""


def run(name: str, rng: Any) -> list[float]:
    """Seconds of each step of one run."""
    solver = create_solver(name, CONFIG, STEPS)
    source = np.random.default_rng(0)
    latents = source.standard_normal(SHAPE, np.float32) * np.float32(solver.init_noise_sigma)
    noise_pred = source.standard_normal(SHAPE, np.float32)
    state = solver.new_state(SHAPE)
    times = []
    for index in range(len(solver)):
        start = time.perf_counter()
        solver.step(state, index, noise_pred, latents, rng)
        times.append(time.perf_counter() - start)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedulers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="default: 40")
    rounds = parser.parse_args(arguments).rounds
    sources: Mapping[str, Callable[[], Any]] = {
        "step": NoNoise,
        "drawn": lambda: np.random.Generator(np.random.Philox(0)),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in sources} for name in SCHEDULERS}
    for _ in range(rounds):
        for name, kinds in seconds.items():
            for kind, times in kinds.items():
                times.extend(run(name, sources[kind]()))
    report = {
        name: {f"{kind}_us": round(statistics.median(times) * 1e6, 1) for kind, times in kinds.items()}
        for name, kinds in seconds.items()
    }
    about = origin(f"python -m benchmarks.schedulers --rounds {rounds}", "runtime/schedulers")
    print(json.dumps({**about, "machine": machine() | {"numpy": np.__version__}, "rounds": rounds, **report}, indent=2))


if __name__ == "__main__":
    main()
