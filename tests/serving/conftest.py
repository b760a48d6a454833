"""A server over the service that is told what to do, on a real socket, and OpenAI's own clients of it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from calotype.serving.app import create_app
from calotype.serving.http.connections import connections
from calotype.serving.http.drawing import Front, Settings
from calotype.serving.http.limits import Limits
from tests.serving.fakes import FakeService, served


@dataclasses.dataclass
class Place:
    """A server that runs: its address, the service behind it, and the application."""

    url: str
    service: FakeService
    app: Any

    @property
    def front(self) -> Front:
        """What its endpoints work with."""
        found: Front = self.app.state.front
        return found

    def client(self, key: str = "none needed", **options: object) -> openai.OpenAI:
        """OpenAI's client, which checks what it is answered, and tries nothing twice."""
        given: dict[str, object] = {"max_retries": 0, "timeout": 30, "_strict_response_validation": True, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)  # type: ignore[arg-type]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Ask without a client's help; returns status, headers and what the JSON says, or else the text."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            text = answer.read()
            found = json.loads(text) if answer.headers.get_content_type() == "application/json" else text.decode()
            return answer.status, answer.headers, found

    def until(self, true: Callable[[], object]) -> None:
        """Wait until something is so."""
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end, "it never came to it"
            time.sleep(0.005)


@pytest.fixture(scope="module")
def server() -> Iterator[Place]:
    """One for a file's tests; ``place`` gives it to each as if it were new."""
    service = FakeService()
    app = create_app(Front(service, Settings()))
    quick = Limits(header_seconds=1, stalled_seconds=1, body_seconds=5)
    with served(app, http=connections(Settings(limits=quick))) as url:
        yield Place(url=url, service=service, app=app)


@pytest.fixture
def place(server: Place) -> Iterator[Place]:
    """The server, with nothing on its way, and every setting as it is by default."""
    server.service.reset()
    server.front.settings = Settings()
    yield server
    server.service.reset()
    server.front.settings = Settings()
    server.until(lambda: not server.service.running)


@pytest.fixture
def client(place: Place) -> Iterator[openai.OpenAI]:
    """OpenAI's client of it."""
    with place.client() as own:
        yield own


def image_file(image: Image.Image, kind: str = "PNG") -> io.BytesIO:
    """A picture as a client sends it."""
    data = io.BytesIO()
    image.save(data, kind)
    data.seek(0)
    data.name = f"picture.{kind.lower()}"
    return data


def transparent(width: int, height: int, hole: tuple[int, int, int, int]) -> Image.Image:
    """OpenAI's mask: transparent in the box ``hole``; its colours, which say nothing, are ours the other way round."""
    mask = Image.new("RGBA", (width, height), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), hole)
    return mask
