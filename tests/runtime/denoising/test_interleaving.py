"""Requests of every kind, prepared and moved in any order beside each other: each gives the bytes that it has alone.

That is what lets a server put new requests into a loop that runs. The network is a real one, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.preparation import Drawing
from calotype.runtime.request import Request

LONG = "red apple " * 30  # more than one chunk of tokens
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
MASK = Image.new("L", (32, 32))
MASK.paste(255, (8, 8, 24, 24))
SOURCES: list[dict[str, Any]] = [
    {},
    {"image": PICTURE, "strength": 0.6},
    {"image": PICTURE, "mask_image": MASK, "strength": 1.0},
]
REQUESTS = st.builds(
    lambda source, **fields: Request(**fields, **source),
    st.sampled_from(SOURCES),
    prompt=st.sampled_from(["red", "apple", LONG]),
    negative_prompt=st.sampled_from(["", "le"]),
    seed=st.integers(0, 2),
    num_inference_steps=st.integers(3, 5),
    scheduler=st.sampled_from(["euler", "euler-a", "dpmpp-2m", "heun", "unipc"]),
    guidance_scale=st.sampled_from([1.0, 4.0]),
    guidance_interval=st.sampled_from([None, (0.5, 3.0)]),
    fast=st.sampled_from([None, Acceleration(cache_interval=2)]),
    height=st.just(32),
    width=st.sampled_from([32, 40]),
)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, "cpu") as opened:
        yield opened


def alone(pipeline: Pipeline, request: Request) -> bytes:
    job = pipeline.prepare(request)
    while not job.done:
        pipeline.step([job])
    return bytes(pipeline.finish(job).image.tobytes())


def check_any_order(pipeline: Pipeline, requests: list[Request], data: st.DataObject) -> None:
    waiting, running, finished = list(enumerate(requests)), list[tuple[int, Drawing]](), {}
    while waiting or running:
        arrive = data.draw(st.integers(0 if running else 1, max(len(waiting), 1)))
        running += [(number, pipeline.prepare(request)) for number, request in waiting[:arrive]]
        del waiting[:arrive]
        moved = data.draw(st.lists(st.sampled_from(running), min_size=1, unique_by=lambda item: item[0]))
        pipeline.step([job for _, job in moved])
        for number, job in [item for item in running if item[1].done]:
            finished[number] = pipeline.finish(job).image.tobytes()
        running = [item for item in running if not item[1].done]
    for number, request in enumerate(requests):
        assert finished[number] == alone(pipeline, request), request


@given(requests=st.lists(REQUESTS, min_size=2, max_size=4), data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_requests_in_any_order(pipeline: Pipeline, requests: list[Request], data: st.DataObject) -> None:
    check_any_order(pipeline, requests, data)


@pytest.mark.slow
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_requests_in_any_order_at_length(pipeline: Pipeline, requests: list[Request], data: st.DataObject) -> None:
    check_any_order(pipeline, requests, data)


def test_a_request_is_drawn_as_a_call_draws_it(pipeline: Pipeline) -> None:
    request = Request(prompt="red", seed=3, num_inference_steps=3, guidance_scale=4, scheduler="euler")
    called = pipeline("red", seed=3, num_inference_steps=3, guidance_scale=4, scheduler="euler")
    assert alone(pipeline, request) == called.images[0].tobytes()
    drawn = dict(pipeline.draw([request, Request(prompt=LONG, seed=4, num_inference_steps=2)]))
    assert drawn[0].image.tobytes() == called.images[0].tobytes()
    assert drawn[1].settings.request.num_inference_steps == 2


def test_pictures_are_yielded_as_they_are_finished(pipeline: Pipeline) -> None:
    requests = [Request(prompt=text, seed=1, num_inference_steps=count) for text, count in (("red", 5), ("apple", 2))]
    assert [number for number, _ in pipeline.draw(requests)] == [1, 0]


def test_what_is_not_done_has_no_picture(pipeline: Pipeline) -> None:
    job = pipeline.prepare(Request(prompt="red", num_inference_steps=2))
    pipeline.step([job])
    with pytest.raises(InputError, match=r"a job at step 1 of 2 is no picture yet; step\(\) it until it is done"):
        pipeline.finish(job)
