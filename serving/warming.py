"""A model's first pictures, for nobody: they open what opens late, and measure what every part takes."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calotype.runtime.families import family_of
from calotype.runtime.pictures.reading import Source, picture_of
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.preparation import Drawing
from calotype.runtime.request import Request
from calotype.serving.batcher import area_of, network_of
from calotype.serving.costs import DECODE, ENCODE, TEXT
from calotype.serving.messages import Observation, Size

STEPS = 4  # of the schedule; not all of them are taken
QUICK = 0.25  # seconds: what takes less is measured three times, since the first is slow
PROMPTS = ("a", "a red apple on a table", "")


def warm(name: str, pipeline: Pipeline, size: Size) -> Iterator[tuple[Observation, Drawing | None]]:
    """Draw at ``size`` (width, height); yields what each part took, with the job where one is done.

    Args:
        name: under which the model is served.
        pipeline: the model.
        size: in pixels.

    Raises:
        CalotypeError: the model cannot draw at that size.
    """
    width, height = size
    makes = [_request(pipeline, width, height, text, guided=guided) for guided in (False, True) for text in PROMPTS[:1]]
    if "vae_encoder" in pipeline.manifest.networks and makes[0].image is None:
        grey = _even(width, height, 128)
        makes.append(_request(pipeline, width, height, PROMPTS[1], guided=True, image=grey))
    job: Drawing | None = None
    for request in makes:
        begin = time.perf_counter()
        job = pipeline.prepare(request)
        seconds = time.perf_counter() - begin
        area = area_of(job.key)
        yield Observation(name, TEXT, 0, 1, seconds - job.picture_seconds), None
        if request.image is not None:
            yield Observation(name, ENCODE, area, 1, job.picture_seconds), None
        yield from _runs(name, pipeline, [job])
    assert job is not None
    yield from _larger(name, pipeline, makes[1])
    job.end_early()
    while not job.done:
        pipeline.advance([job])
    for _ in range(3):
        begin = time.perf_counter()
        pipeline.finish(job, "np")
        seconds = time.perf_counter() - begin
        yield Observation(name, DECODE, job.latents[0].size, 1, seconds), job
        if seconds > QUICK:
            break
    pipeline.trim()


def _request(
    pipeline: Pipeline, width: int, height: int, prompt: str, *, guided: bool, image: Source | None = None
) -> Request:
    shown = family_of(pipeline.manifest.family).context_channels(pipeline.manifest) > 0
    mask = None
    if shown:
        image = mask = _even(width, height, 255)
    return Request(
        prompt=prompt,
        seed=0,
        width=width,
        height=height,
        num_inference_steps=STEPS,
        guidance_scale=4.0 if guided else 1.0,
        image=image,
        mask_image=mask,
    )


def _even(width: int, height: int, value: int) -> Source:
    return picture_of(np.full((height, width, 3), value, np.uint8), "the first picture")


def _larger(name: str, pipeline: Pipeline, request: Request) -> Iterator[tuple[Observation, None]]:
    """Runs of several pictures: twice as many each time, as long as the session takes them."""
    jobs = [pipeline.prepare(request)]
    most = pipeline.capacity(jobs[0].key)
    while 2 * len(jobs) * jobs[0].rows <= most:
        jobs = [pipeline.prepare(request) for _ in range(2 * len(jobs))]
        yield from _runs(name, pipeline, jobs)


def _runs(name: str, pipeline: Pipeline, jobs: list[Drawing]) -> Iterator[tuple[Observation, None]]:
    rows, key = sum(job.rows for job in jobs), jobs[0].key
    for _ in range(3):
        if any(job.done for job in jobs):
            return
        begin = time.perf_counter()
        pipeline.advance(jobs)
        seconds = time.perf_counter() - begin
        yield Observation(name, network_of(key), area_of(key), rows, seconds), None
        if seconds > QUICK:
            return


def own_size(pipeline: Pipeline) -> Size:
    """The size that the model draws where nobody says (width, height)."""
    defaults = pipeline.manifest.defaults
    return defaults.width, defaults.height


def resident() -> tuple[int, int]:
    """Bytes of the machine's memory that this process takes now, and at most since :func:`forget_peak`."""
    found = {"VmRSS": 0, "VmHWM": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            label, _, value = line.partition(":")
            if label in found:
                found[label] = int(value.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


def forget_peak() -> None:
    """Let the peak count from now on, where the system lets."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
