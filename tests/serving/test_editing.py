"""A model that edits, served: its pictures are references, and its jobs share a worker's runs as any other's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.serving.app import create_app
from calotype.serving.http.drawing import Front, Settings
from calotype.serving.tasks import Drawn
from calotype.serving.workers.messages import Open
from calotype.serving.workers.served import Served
from tests.serving.conftest import Place, image_file, transparent
from tests.serving.fakes import FakeService, served
from tests.serving.running import running


@pytest.fixture(scope="module")
def place(klein_bundle: Path) -> Iterator[Place]:
    """A server of the model, whose service draws no more than a gradient."""
    service = FakeService("klein", manifest=Manifest.read(klein_bundle))
    app = create_app(Front(service, Settings()))
    with served(app) as url:
        yield Place(url=url, service=service, app=app)


@pytest.fixture(autouse=True)
def nothing_submitted(place: Place) -> None:
    place.service.submitted.clear()


def test_pictures_without_a_mask_are_references(place: Place) -> None:
    sizes = ((64, 96), (67, 40))
    pictures = [image_file(Image.new("RGB", size)) for size in sizes]
    with place.client() as client:
        answer = client.images.edit(image=pictures, prompt="a hat", n=2)
    assert answer.data is not None and len(answer.data) == 2
    assert answer.size == "64x96"
    for task in place.service.submitted:
        assert task.request.image is None
        assert [own.size for own in task.request.references if isinstance(own, Image.Image)] == [(64, 96), (64, 40)]


def test_a_mask_or_a_strength_draws_over(place: Place) -> None:
    with place.client() as client:
        mask = image_file(transparent(64, 64, (8, 8, 24, 24)))
        client.images.edit(image=image_file(Image.new("RGB", (64, 64))), mask=mask, prompt="a hat")
        client.images.edit(image=image_file(Image.new("RGB", (64, 64))), prompt="a hat", extra_body={"strength": 0.5})
    for task in place.service.submitted:
        assert task.request.image is not None
        assert task.request.references == ()


def test_what_cannot_be_a_reference_is_of_the_field_image(place: Place) -> None:
    with place.client() as client, pytest.raises(Exception, match="the reference picture has 200x8 pixels") as found:
        client.images.edit(image=image_file(Image.new("RGB", (200, 8))), prompt="a hat")
    assert getattr(found.value, "param", None) == "image"


def reference(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8))


MIXED: list[dict[str, Any]] = [
    {"prompt": "a red apple", "seed": 1, "num_inference_steps": 3},
    {"prompt": "a fox", "seed": 2, "num_inference_steps": 4, "scheduler": "heun"},
    {"prompt": "a hat", "seed": 3, "references": (reference(1),)},
    {"prompt": "a red hat", "seed": 4, "references": (reference(2),), "num_inference_steps": 2},
    {"prompt": "a boat", "seed": 5, "image": reference(3), "strength": 0.7},
]


def test_a_worker_draws_the_bytes_that_each_has_alone(klein_bundle: Path) -> None:
    """The loop of a real worker, with jobs of unlike steps, solvers and references, those that may in one run."""
    served_model = Served.of(Open(name="klein", bundle=str(klein_bundle), backend="cpu", threads=1, sizes=((32, 32),)))
    given = [{"width": 32, "height": 32, "num_inference_steps": 4, **mixed} for mixed in MIXED]
    with running(served_model) as server:

        async def draw() -> list[Drawn]:
            tickets = server.dispatcher.submit([server.task(model="klein", **own) for own in given])
            return await asyncio.gather(*(ticket.drawn() for ticket in tickets))

        found = server.run(draw())
    with Pipeline.load(klein_bundle, "cpu", threads=1) as pipeline:
        for own, drawn in zip(given, found, strict=True):
            ((_, alone),) = pipeline.draw([Request(**own)])
            assert np.array_equal(drawn.pixels, np.asarray(alone.image))
