"""A model's first pictures, for nobody: they open what opens late, and measure what every part takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from calotype.runtime.arrays import Array
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.control import Control
from calotype.runtime.families import family_of
from calotype.runtime.pictures.reading import Source, picture_of
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.preparation import Drawing
from calotype.runtime.request import Request
from calotype.serving.tasks import Pixels
from calotype.serving.workers.batcher import area_of, network_of
from calotype.serving.workers.costs import DECODE, ENCODE, TEXT
from calotype.serving.workers.messages import Observation, Size

STEPS = 4  # of the schedule; not all of them are taken
SMALL = 128  # pixels
QUICK = 0.25  # seconds: what takes less is measured three times, since the first is slow


def warm(
    name: str, pipeline: Pipeline, size: Size, controls: Sequence[str] = (), *, known: bool = False
) -> Iterator[tuple[Observation, tuple[Array, Pixels] | None]]:
    """Draw at ``size`` (width, height); yields what each part took, and of a picture its latents and pixels.

    Args:
        name: under which the model is served.
        pipeline: the model.
        size: in pixels.
        controls: the names of its ControlNets.
        known: whether it was measured before, so that one step of one picture is enough.

    Raises:
        CalotypeError: the model cannot draw at that size.
    """
    plain, guided = (_request(pipeline, size, guided=own) for own in (False, True))
    job = yield from _prepared(name, pipeline, guided)
    if known:
        pipeline.advance([job])
    else:
        yield from _runs(name, pipeline, [job])
        single = yield from _prepared(name, pipeline, plain)
        yield from _runs(name, pipeline, [single])
        yield from _larger(name, pipeline, guided)
        for control in controls:
            shown = Control(model=control, image=_even(size, 128))
            controlled = yield from _prepared(name, pipeline, dataclasses.replace(guided, controls=(shown,)))
            yield from _runs(name, pipeline, [controlled])
        if "vae_encoder" in pipeline.manifest.networks:
            grey = dataclasses.replace(guided, image=_even(size, 128), mask_image=None)
            yield from _prepared(name, pipeline, grey if guided.image is None else guided)
    job.end_early()
    while not job.done:  # a solver of second order may be within a step
        pipeline.advance([job])
    yield from _finished(name, pipeline, job, times=1 if known else 3)
    pipeline.trim()


def _prepared(name: str, pipeline: Pipeline, request: Request) -> Generator[tuple[Observation, None], None, Drawing]:
    begin = time.perf_counter()
    job = pipeline.prepare(request)
    seconds = time.perf_counter() - begin
    yield Observation(name, TEXT, 0, 1, seconds - job.picture_seconds), None
    if request.image is not None:
        yield Observation(name, ENCODE, job.latents[0].size, 1, job.picture_seconds), None
    return job


def _finished(
    name: str, pipeline: Pipeline, job: Drawing, times: int
) -> Iterator[tuple[Observation, tuple[Array, Pixels]]]:
    for _ in range(times):
        begin = time.perf_counter()
        picture = pipeline.finish(job)
        seconds = time.perf_counter() - begin
        yield Observation(name, DECODE, job.latents[0].size, 1, seconds), (job.latents, np.asarray(picture.image))
        if seconds > QUICK:
            return


def _request(pipeline: Pipeline, size: Size, *, guided: bool) -> Request:
    """One that the model can draw; one for inpainting is given a picture and a mask."""
    shown = family_of(pipeline.manifest.family).context_channels(pipeline.manifest) > 0
    picture = _even(size, 255) if shown else None
    return Request(
        prompt="a red apple on a table" if guided else "a",
        seed=0,
        width=size[0],
        height=size[1],
        num_inference_steps=STEPS,
        guidance_scale=4.0 if guided else 1.0,
        image=picture,
        mask_image=picture,
    )


def _even(size: Size, value: int) -> Source:
    return picture_of(np.full((size[1], size[0], 3), value, np.uint8), "the first picture")


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


def sizes_of(manifest: Manifest) -> tuple[Size, ...]:
    """What is warmed where nobody says: the size that the model draws, and one of another area.

    From two areas it is known how time and memory grow with them: half the sides, or twice where that is a small size.
    """
    width, height = manifest.defaults.width, manifest.defaults.height
    factor, double = manifest.vae.downscale, max(width, height) <= SMALL
    other = tuple(2 * side if double else max(factor, side // 2 // factor * factor) for side in (width, height))
    return tuple(sorted([(width, height), (other[0], other[1])]))
