"""A server over the service that is told what to do, on a real socket, and OpenAI's own clients of it."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Iterator

import openai
import pytest
from PIL import Image

from calotype.serving.app import create_app
from calotype.serving.connections import connections
from calotype.serving.drawing import Front, Settings
from calotype.serving.limits import Limits
from tests.serving.fakes import FakeService, served


@dataclasses.dataclass
class Place:
    """A server that runs: its address, the service behind it, and what its endpoints work with."""

    url: str
    service: FakeService
    front: Front

    def client(self, key: str = "none needed", **options: object) -> openai.OpenAI:
        """OpenAI's client, which checks what it is answered, and tries nothing twice."""
        given: dict[str, object] = {"max_retries": 0, "timeout": 30, "_strict_response_validation": True, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)  # type: ignore[arg-type]

    def until(self, true: Callable[[], object]) -> None:
        """Wait until something is so."""
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end, "it never came to it"
            time.sleep(0.005)


@pytest.fixture(scope="session")
def server() -> Iterator[Place]:
    """One for all tests; ``place`` gives it to each as if it were new."""
    service = FakeService()
    app = create_app(Front(service, Settings()))
    quick = Limits(header_seconds=1, stalled_seconds=1, body_seconds=5)
    with served(app, http=connections(quick)) as url:
        yield Place(url=url, service=service, front=app.state.front)


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
    """OpenAI's mask: black, and transparent in the box ``hole``."""
    mask = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), hole)
    return mask
