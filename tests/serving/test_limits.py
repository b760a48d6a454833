"""What may be asked for, and what happens to a client that sends too much, too slowly, or takes nothing."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import InputError
from calotype.runtime.request import Request
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.connections import connections
from calotype.serving.http.drawing import Settings
from calotype.serving.http.limits import Limits
from tests.serving.conftest import Place
from tests.serving.fakes import address, started

POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connected(place: Place) -> socket.socket:
    host, _, port = place.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def everything(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection; what it does abruptly is an end, too."""
    found = b""
    try:
        while data := connection.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def test_each_limit_has_its_error() -> None:
    manifest = Bundle.open("talbot", weights=False).manifest
    limits = Limits(steps=20, output_pixels=128 * 128, prompt_characters=5, loras=1, images=2)
    limits.check(Request(prompt="abcde", negative_prompt="abcde", num_inference_steps=20), manifest)
    for fields, param in (
        ({"prompt": "abcdef"}, "prompt"),
        ({"negative_prompt": "abcdef"}, "negative_prompt"),
        ({"num_inference_steps": 21}, "num_inference_steps"),
        ({"timesteps": tuple(range(21, 0, -1))}, "num_inference_steps"),
        ({"width": 136}, "size"),
        ({"height": 256, "width": 128}, "size"),
    ):
        with pytest.raises(RequestRefusedError) as found:
            limits.check(Request(**{"prompt": "", **fields}), manifest)  # type: ignore[arg-type]
        assert found.value.param == param and "at most" in str(found.value)
    # What the model does where nobody asks for anything is its operator's choice.
    Limits(steps=1).check(Request(prompt=""), manifest)
    with pytest.raises(RequestRefusedError, match="n is 3 pictures, and this server takes at most 2"):
        limits.check_images(3)


def test_limits_that_are_none_are_refused() -> None:
    for field in dataclasses.fields(Limits):
        for value in (-1, "1", None, True, float("nan"), float("inf")):
            with pytest.raises(InputError, match=f"the limit {field.name}="):
                Limits(**{field.name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the limit steps=1\.5 is not a whole number from 1 on"):
        Limits(steps=1.5)  # type: ignore[arg-type]
    assert Limits(loras=0).loras == 0


@pytest.mark.parametrize("sized", [True, False])
def test_a_body_that_is_too_large_is_refused_in_words(place: Place, sized: bool) -> None:
    """Also where it does not say how large it is; the client is still sending when it is told."""
    place.front.settings = Settings(limits=Limits(body_bytes=100_000))
    body = json.dumps({"prompt": "x" * 3_000_000}).encode()
    pieces = iter([body[start : start + 65536] for start in range(0, len(body), 65536)])
    with place.client() as client, pytest.raises(openai.APIStatusError) as found:
        client.post("/images/generations", content=body if sized else pieces, cast_to=object)  # type: ignore[arg-type]
    assert found.value.status_code == 413 and found.value.code == "request_too_large"
    assert "more than 100000 bytes" in found.value.message
    assert not place.service.submitted


def test_bodies_have_room_together(place: Place) -> None:
    place.front.settings = Settings(limits=Limits(bodies_bytes=1000))
    with connected(place) as first:
        first.sendall(POST + b"Content-Length: 901\r\n\r\n" + b" " * 900)
        place.until(lambda: held(place) == 900)
        status, headers, answer = place.ask(
            "POST", "/v1/images/generations", b" " * 200, content_type="application/json"
        )
        assert status == 503 and headers["Retry-After"] == "5" and "no memory for more" in answer["error"]["message"]
    place.until(lambda: held(place) == 0)
    status, _, _ = place.ask("POST", "/v1/images/generations", b'{"prompt": "x"}', content_type="application/json")
    assert status == 200 and held(place) == 0


def held(place: Place) -> int:
    """Bytes of bodies that the layer has which reads them; layers are there from the first request on."""
    place.ask("GET", "/livez")
    layer: Any = place.app.middleware_stack
    while not hasattr(layer, "_held"):
        layer = getattr(layer, "app", None) or layer._app
    return int(layer._held)


def test_a_body_that_does_not_arrive_is_cut_off(place: Place) -> None:
    place.front.settings = Settings(limits=Limits(body_seconds=0.3))
    with connected(place) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.3 seconds" in answer
    assert b"connection: close" in answer.lower() and b"x-should-retry: false" in answer.lower()


@pytest.mark.parametrize("lines", [b"", b"P", POST])
def test_lines_that_do_not_arrive_are_cut_off(place: Place, lines: bytes) -> None:
    """The connections of these tests give them a second."""
    with connected(place) as connection:
        connection.sendall(lines)
        assert everything(connection) == b""


def test_a_connection_that_is_kept_has_as_long_for_its_next_request(place: Place) -> None:
    with connected(place) as connection:
        for _ in range(2):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"alive"}'):
                answer += connection.recv(1 << 16)
        connection.sendall(b"GET /livez HT")
        assert everything(connection) == b""


def test_an_answer_that_nobody_takes_is_cut_off() -> None:
    """One that is taken slowly, and still by more than a kilobyte a second, is not."""
    begun = []

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        begun.append(len(begun))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(1 << 25)})

    with started(application, http=connections(Settings(limits=Limits(stalled_seconds=1)))) as server:
        host, _, port = address(server).removeprefix("http://").partition(":")
        end = time.monotonic() + 60
        for reads in (False, True):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                while len(begun) <= reads and time.monotonic() < end:
                    time.sleep(0.005)
                taken, until = 0, time.monotonic() + 1.5  # for longer than nothing may be taken
                while reads and time.monotonic() < until:
                    taken += len(connection.recv(1 << 17))
                    time.sleep(0.01)
                if reads:
                    assert taken + len(everything(connection)) > 1 << 25
                while server.server_state.connections:
                    assert time.monotonic() < end, "the connection stays"
                    time.sleep(0.005)


def test_nothing_is_written_to_a_disk(place: Place, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large upload would be, by default."""
    import tempfile

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    padded = Path(__file__).parent.parent.parent / "docs" / "talbot.png"
    data = padded.read_bytes() + b"\0" * (3 << 20)
    assert client.images.edit(image=data, prompt="x", size="64x64").data
    assert len(place.service.submitted) == 1


def test_the_timers_of_connections_follow_the_configuration() -> None:
    async def application(_scope: Any, _receive: Any, _send: Any) -> None:
        raise AssertionError("nothing was asked for")

    bounded = SimpleNamespace(limits=Limits(header_seconds=1000))
    with started(application, http=connections(bounded)) as server:
        bounded.limits = Limits(header_seconds=0.2)  # as SIGHUP does
        host, _, port = address(server).removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            assert connection.recv(1) == b""
