"""What a bundle takes on this machine: time, cold start, memory, and the host's share of a step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions.session import Sizes
from calotype.runtime.sessions.shapes import Shape, ShapedSession, allocate

PROMPT = "a lighthouse at dusk"
HOST_STEPS = 100
HOST_SCHEDULERS = ("euler", "dpmpp-2m", "ddim", "unipc")
SAMPLING = 0.01  # seconds between two looks at a process's memory


def latency(
    pipeline: Pipeline, *, images: int = 1, height: int | None = None, steps: int | None = None, rounds: int = 3
) -> dict[str, Any]:
    """Median seconds per picture, step and stage of square pictures, after a first call that is not counted."""
    settings: dict[str, Any] = {"height": height, "width": height, "num_images_per_prompt": images, "seed": 0}
    pipeline(PROMPT, **settings, num_inference_steps=1)
    timings = [pipeline(PROMPT, **settings, num_inference_steps=steps).timings for _ in range(rounds)]
    return {
        "images": images,
        "picture_s": statistics.median(item.total for item in timings) / images,
        "step_s": statistics.median(second for item in timings for second in item.runs),
        "denoising_s": statistics.median(item.denoising for item in timings),
        "vae_decoder_s": statistics.median(item.vae_decoder for item in timings),
    }


def cold_start(bundle: Bundle, backend: str, *, cached: bool, steps: int | None = None) -> dict[str, float | None]:
    """Seconds from the start of a process to a picture on disk, and its largest resident size in MB.

    ``peak_own_mb`` leaves out the pages of mapped files, which the system takes back when it needs them; None where
    the system does not tell. Without ``cached``, the bundle's files are first dropped from the system's cache, where
    the system can.
    """
    if not cached:
        drop_cache(bundle.path / name for name in bundle.manifest.files)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "calotype.runtime", "generate", PROMPT, "-m", str(bundle.path)]
        command += ["-o", str(Path(folder) / "picture.png"), "--seed", "0", "--backend", backend]
        command += [] if steps is None else ["--steps", str(steps)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(_peak_own, process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return {"seconds": seconds, "peak_resident_mb": usage.ru_maxrss * unit / 1e6, "peak_own_mb": own.result()}


def _peak_own(pid: int) -> float | None:
    """The most MB of the process ``pid`` that are not pages of files, until it ends; looked at now and then."""
    path, peak = Path(f"/proc/{pid}/status"), None
    while True:
        try:
            values = dict(line.split(":", 1) for line in path.read_text().splitlines())
            peak = max(peak or 0, int(values["RssAnon"].split()[0]) * 1024 / 1e6)
        except (OSError, KeyError, ValueError):  # no such system, or it has ended
            return peak
        time.sleep(SAMPLING)


def drop_cache(paths: Iterable[Path]) -> None:
    """Ask the system to forget what it has read of these files."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


class InstantSession(ShapedSession[Shape]):
    """A UNet that answers at once, so that what is left of a step is the host's; see :class:`Session`.

    Args:
        channels: of the latents.
        width: of the text embeddings.
        capacity: the most rows of a run.
        inputs: more of them.
        outputs: likewise.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        capacity: int = 2,
        *,
        inputs: Sequence[TensorSpec] = (),
        outputs: Sequence[TensorSpec] = (),
    ) -> None:
        latents = ("rows", channels, "height", "width")
        usual = (
            TensorSpec(name="sample", dtype="float32", shape=latents),
            TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
            TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("rows", "tokens", width)),
        )
        noise_pred = TensorSpec(name="noise_pred", dtype="float32", shape=latents)
        super().__init__((*usual, *inputs), (noise_pred, *outputs), "the instant UNet")
        self._capacity = capacity

    def capacity(self, sizes: Sizes) -> int:
        """See :meth:`Session.capacity`."""
        return self._capacity

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        self._at(sizes)

    def _prepare(self, sizes: Sizes) -> Shape:
        return Shape(views=allocate(self._tensors, sizes, self._links))


def host_overhead(side: int, *, jobs: int = 1) -> dict[str, float]:
    """Microseconds of the host in a step of ``jobs`` pictures of ``side`` x ``side`` x 4 latents in one run.

    One is guided. Several are mixed: every second is guided, their schedulers differ, and each is at another step.
    ``allocated_bytes`` is the most that was allocated at once during the steps, above what stood before.
    """
    unet = InstantSession(4, 768, capacity=2 * jobs)
    denoiser = Denoiser(lambda _: unet)
    work = [_host_job(number, (4, side, side)) for number in range(jobs)]
    denoiser.reserve(work)
    for number, job in enumerate(work):
        denoiser.step([job] * (number > 0))
    times = []
    for _ in range(HOST_STEPS - jobs - 10):
        start = time.perf_counter()
        denoiser.step(work)
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(5):
            denoiser.step(work)
        allocated = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return {"step_us": statistics.median(times) * 1e6, "allocated_bytes": float(allocated)}


def _host_job(number: int, shape: tuple[int, ...]) -> Job:
    solver = create_solver(HOST_SCHEDULERS[number % len(HOST_SCHEDULERS)], {}, HOST_STEPS)
    row = {"encoder_hidden_states": np.zeros((77, 768), np.float32)}
    return Job(
        latents=np.zeros(shape, np.float32),
        conditional=row,
        unconditional=dict(row) if number % 2 == 0 else None,
        guidance=Guidance(scale=7.5),
        solver=solver,
        state=solver.new_state(shape),
        rng=np.random.Generator(np.random.Philox(number)),
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text in columns."""
    cells = [list(rows[0])] + [[_text(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return json.dumps(value).strip('"')
