"""The host's own time in a denoising step: ``python -m benchmarks.host``, JSON.

The UNet is a fake session that computes nothing, so what is left of a step is what the host does: it fills the inputs,
guides, and moves the latents by one step of their solver. Measured are one guided job, and eight jobs that differ in
guidance, solver and position and are moved together; the aims are 50 and 150 microseconds at latents of 64x64x4, and
less than 4 KiB that a step allocates at any moment.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, machine, origin, results
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.diagnostics.benchmark import InstantSession
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions import Sizes
from calotype.runtime.sessions.shapes import Shape

CHANNELS, WIDTH, TOKENS = 4, 768, 77
SCHEDULE = 200  # steps; a job begins anywhere in the first half and is followed for the rest of it at most
WARM_UP = 5
TRACED = 20  # steps whose memory is looked at, in a run of their own: looking costs time
SOLVERS = ("euler", "dpmpp-2m", "ddim", "unipc")  # none of them draws numbers, which takes longer than all the rest
# Those of Stable Diffusion 1.5's scheduler.
SETTINGS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
AIMS_US = {"one guided job": 50, "eight mixed jobs": 150}
AIM_BYTES = 4096


class FakeSession(InstantSession):
    """A UNet that answers the same at once; both rows of a guided picture are alike, so guidance changes nothing."""

    def _prepare(self, sizes: Sizes) -> Shape:
        shape = super()._prepare(sizes)
        shape.views["noise_pred"][:] = 0.5
        return shape


def driver(jobs: Sequence[Job]) -> Callable[[], None]:
    """What moves every one of ``jobs`` by one step, in one run."""
    unet = FakeSession(CHANNELS, WIDTH, capacity=2 * len(jobs))
    denoiser = Denoiser(lambda _: unet)
    denoiser.reserve(jobs)
    return lambda: denoiser.step(jobs)


def one_guided(side: int) -> list[Job]:
    """One guided job of Euler's method."""
    return [new_job(side, "euler", guided=True, index=0)]


def eight_mixed(side: int) -> list[Job]:
    """Eight jobs, every second one guided, each solver twice, no two at the same position."""
    return [
        new_job(side, SOLVERS[number // 2 % len(SOLVERS)], guided=number % 2 == 0, index=11 * number)
        for number in range(8)
    ]


CASES: dict[str, Callable[[int], list[Job]]] = {"one guided job": one_guided, "eight mixed jobs": eight_mixed}


def new_job(side: int, scheduler: str, *, guided: bool, index: int) -> Job:
    """A job whose latents are ``side`` x ``side`` x 4, at the position ``index`` of its schedule."""
    solver, shape = create_solver(scheduler, SETTINGS, SCHEDULE), (CHANNELS, side, side)
    rng = np.random.Generator(np.random.Philox(index))
    row = {"encoder_hidden_states": np.zeros((TOKENS, WIDTH), np.float32)}
    return Job(
        latents=rng.standard_normal(shape, np.float32),
        conditional=row,
        unconditional=row if guided else None,
        guidance=Guidance(scale=7.5 if guided else 1.0),
        solver=solver,
        state=solver.new_state(shape),
        rng=rng,
        index=index,
    )


def microseconds(make: Callable[[], Sequence[Job]], steps: int) -> list[float]:
    """The time of each of ``steps`` steps of all jobs together; new jobs take over where the others end."""
    taken: list[float] = []
    while len(taken) < steps:
        step = driver(make())
        for number in range(WARM_UP + SCHEDULE // 2):
            start = time.perf_counter()
            step()
            if number >= WARM_UP:
                taken.append((time.perf_counter() - start) * 1e6)
    return taken[:steps]


def peak_bytes(make: Callable[[], Sequence[Job]]) -> int:
    """The most that any step holds of newly allocated memory at once."""
    step = driver(make())
    for _ in range(WARM_UP):
        step()
    peak = 0
    tracemalloc.start()
    try:
        for _ in range(TRACED):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            step()
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return peak


def measure(side: int, steps: int) -> dict[str, Any]:
    """The figures of both cases."""
    found = {}
    for name, jobs in CASES.items():
        times = microseconds(lambda jobs=jobs: jobs(side), steps)
        tenths = statistics.quantiles(times, n=100)
        of_times = {"median": statistics.median(times), "min": min(times), "p90": tenths[89], "p99": tenths[98]}
        found[name] = {
            "step_us": {key: round(value, 1) for key, value in of_times.items()},
            "peak_bytes": peak_bytes(lambda jobs=jobs: jobs(side)),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write where that is asked for."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--side", type=int, default=64, help="of the latents; default: 64, which is 512 pixels")
    parser.add_argument("--steps", type=int, default=5000, help="that are timed; default: 5000, some seconds")
    parser.add_argument("--write", action="store_true", help=f"write the figures into {RESULTS.name}/, too")
    options = parser.parse_args(given)
    command = " ".join(["python -m benchmarks.host", *(word for word in given if word != "--write")])
    about = {**origin(command, "benchmarks", "runtime"), "machine": machine() | {"numpy": np.__version__}}
    aims = {"step_us": AIMS_US, "peak_bytes": AIM_BYTES}
    report = {
        **about,
        "latents": [CHANNELS, options.side, options.side],
        "steps": options.steps,
        "aims": aims,
        "cases": measure(options.side, options.steps),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.write:
        results("host").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
