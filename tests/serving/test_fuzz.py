"""Schemathesis asks what the OpenAPI document allows, and what it does not: no answer is a 500, and none is late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from calotype.serving.app import create_app
from calotype.serving.http.drawing import Front, Settings
from calotype.serving.http.limits import Limits
from calotype.serving.http.security import Access
from tests.serving.conftest import Place
from tests.serving.fakes import FakeService
from tests.serving.test_security import ROOT, key


def no_fault(_context: Any, response: Any, _case: Any) -> None:
    """What cannot be drawn in time or has no room is told so: 503 and 504 are no faults."""
    assert response.status_code in (503, 504) or response.status_code < 500, response.text


CHECKS = (
    no_fault,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
)
SMALL = Settings(
    limits=Limits(output_pixels=256 * 256, steps=30, images=2, kept_seconds=5),
    access=Access(admin_keys=(key(ROOT),)),
)
OPERATIONS = [
    *(f"POST /v1/images/{name}" for name in ("generations", "edits")),
    *(f"GET /controlnet/{name}" for name in ("model_list", "module_list", "version")),
    *(f"GET /v1/{name}" for name in ("models", "models/{model}", "images/kept/{name}")),
    *(f"POST /sdapi/v1/{name}" for name in ("txt2img", "img2img", "png-info", "options")),
    *(f"POST /sdapi/v1/{name}" for name in ("interrupt", "skip", "refresh-checkpoints")),
    *(f"GET /sdapi/v1/{name}" for name in ("progress", "options", "sd-models", "loras", "samplers", "schedulers")),
    *(f"GET /sdapi/v1/{name}" for name in ("embeddings", "extensions", "face-restorers", "hypernetworks", "scripts")),
    *(f"GET /sdapi/v1/{name}" for name in ("latent-upscale-modes", "prompt-styles", "realesrgan-models", "sd-vae")),
    *(f"GET /sdapi/v1/{name}" for name in ("script-info", "upscalers")),
    *(f"GET /{name}" for name in ("livez", "readyz", "metrics", "admin/state")),
    *(f"POST /admin/models/{name}" for name in ("load", "unload", "warm")),
]


@pytest.fixture(scope="module")
def schema() -> Any:
    """Of the application as clients get it."""
    return schemathesis.openapi.from_dict(create_app(Front(FakeService(), Settings())).openapi())


@pytest.fixture
def small(place: Place) -> Iterator[Place]:
    """The server, with pictures that are small."""
    place.front.settings = SMALL
    place.service.step_seconds = 0
    yield place


def fuzz(schema: Any, place: Place, name: str, examples: int) -> None:
    method, path = name.split(" ")

    # A form has no types and no empty list, and AUTOMATIC1111's clients may write 0 for false.
    strict = not path.startswith(("/v1/images/edits", "/sdapi"))
    operation = schema[path][method]
    cases = operation.as_strategy()
    if method == "POST":
        cases |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @given(case=cases)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        headers = {"Authorization": f"Bearer {ROOT}"} if path.startswith("/admin") else {}
        response = case.call(base_url=place.url, headers=headers, timeout=30)
        case.validate_response(response, checks=(*CHECKS, negative_data_rejection) if strict else CHECKS)

    ask()
    place.until(lambda: place.service.load.waiting == 0 and not place.service.running)


def test_the_document_has_every_operation(schema: Any) -> None:
    found = [f"{own.ok().method.upper()} {own.ok().path}" for own in schema.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_few_of_everything(schema: Any, small: Place, name: str) -> None:
    fuzz(schema, small, name, 15)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_much_of_everything(schema: Any, small: Place, name: str) -> None:
    fuzz(schema, small, name, 1000)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda own: st.lists(own, max_size=4) | st.dictionaries(st.text(), own, max_size=4),
    max_leaves=8,
)


def odd(place: Place, path: str, examples: int) -> None:
    """Bodies that have the right names, and anything behind them."""
    names = st.sampled_from(
        ["prompt", "n", "size", "seed", "model", "loras", "stream", "deadline", "sizes", "clip_skip"]
    )

    @given(body=st.dictionaries(names, VALUES, max_size=5))
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def ask(body: dict[str, Any]) -> None:
        data = json.dumps({"prompt": "x", "num_inference_steps": 1, **body}).encode()
        headers = {"content_type": "application/json", "authorization": f"Bearer {ROOT}"}
        status, _, answer = place.ask("POST", path, data, **headers)
        assert status in (200, 202, 400, 404, 504), answer

    ask()


@pytest.mark.parametrize("path", ["/v1/images/generations", "/admin/models/warm"])
def test_odd_bodies(small: Place, path: str) -> None:
    odd(small, path, 50)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/images/generations", "/admin/models/warm"])
def test_many_odd_bodies(small: Place, path: str) -> None:
    odd(small, path, 3000)
