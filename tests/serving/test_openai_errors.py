"""What OpenAI's clients are told instead of a picture, and that nothing goes on for those who have left."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from PIL import Image

from calotype.serving.errors import (
    DeadlineError,
    DrawingError,
    NotReadyError,
    OutOfMemoryError,
    QueueFullError,
    WorkerDiedError,
)
from calotype.serving.http.drawing import Settings
from calotype.serving.http.limits import Limits
from tests.serving.conftest import Place, image_file, transparent

SQUARE = Image.new("RGB", (64, 64), "green")


def refused(call: Callable[[], Any], status: int, param: str | None = None, message: str = "") -> openai.APIStatusError:
    """That ``call`` is refused so, in one line, within OpenAI's envelope, and with an id."""
    with pytest.raises(openai.APIStatusError) as found:
        call()
    error = found.value
    assert error.status_code == status, error
    assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}
    assert error.param == param and message in error.body["message"] and "\n" not in error.body["message"]
    assert error.request_id is not None and error.request_id.startswith("req_")
    return error


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": 5}, "prompt", "prompt: input should be a valid string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "n is 11 pictures, and this server takes at most 10"),
        ({"n": 2**70}, "n", "at most 10"),
        ({"n": "2"}, "n", "valid integer"),
        ({"size": "12"}, "size", "size: "),
        ({"size": "130x128"}, "size", "no multiple of 8 pixels each way; use 128x128"),
        ({"size": "16384x16384"}, "size", "268435456 pixels (16384x16384), and this server takes at most 4194304"),
        ({"size": "99999x4"}, "size", "a side of more than 16384 pixels"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"output_compression": 50}, "output_compression", "about jpeg and webp"),
        ({"response_format": "url"}, "response_format", "keeps no pictures; ask for b64_json"),
        ({"background": "transparent"}, "background", "no model here draws transparency"),
        ({"partial_images": 2}, "partial_images", "give stream=true too"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"stream": True, "response_format": "url"}, "response_format", "a stream has pictures"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**64 - 1, "n": 2}, "seed", "outside 0..2**64-1 for 2 image(s)"),
        ({"num_inference_steps": 151}, "num_inference_steps", "151 steps, and this server takes at most 150"),
        ({"guidance_scale": "high"}, "guidance_scale", "valid number"),
        ({"guidance_rescale": 2}, "guidance_rescale", "less than or equal to 1"),
        ({"scheduler": "best"}, "scheduler", "valid"),
        ({"loras": [{"name": "../../etc/passwd"}]}, "loras", "there is no LoRA '../../etc/passwd'; valid: none"),
        ({"loras": [{"file": "a"}]}, "loras.0.name", "field required"),
        ({"deadline": 601}, "deadline", "601 seconds, and this server takes at most 600"),
        ({"prompt": "x" * 4001}, "prompt", "4001 characters, and this server takes at most 4000"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", "4001 characters"),
        ({"image": "http://localhost/a.png"}, "image", "there is no field 'image'; valid: "),
        ({"strength": 0.5}, "strength", "there is no field 'strength'"),
    ],
)
def test_fields_that_are_refused(client: openai.OpenAI, fields: dict[str, Any], param: str, message: str) -> None:
    refused(lambda: client.images.generate(prompt="x", extra_body=fields), 400, param, message)


def test_texts_that_are_none(client: openai.OpenAI, place: Place) -> None:
    """Half of a character, as JSON can have it."""
    body = b'{"prompt": "\\ud800"}'
    refused(lambda: client.post("/images/generations", content=body, cast_to=object), 400, "prompt", "unicode")
    body = b'{"prompt": "x", "\\ud800": 1}'
    call = lambda: client.post("/images/generations", content=body, cast_to=object)  # noqa: E731
    refused(call, 400, None, "the body is no request")
    assert not place.service.submitted


def test_numbers_that_are_none(client: openai.OpenAI, place: Place) -> None:
    """JSON has no NaN and no Infinity, and Python reads both."""
    for word in ("NaN", "Infinity"):
        body = f'{{"prompt": "x", "guidance_scale": {word}}}'.encode()
        call = lambda body=body: client.post("/images/generations", content=body, cast_to=object)  # noqa: E731
        refused(call, 400, "guidance_scale", "finite number")
    assert not place.service.submitted


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'{"prompt": "x",}']
)
def test_bodies_that_are_no_object(client: openai.OpenAI, body: bytes) -> None:
    refused(lambda: client.post("/images/generations", content=body, cast_to=object), 400)


@pytest.mark.parametrize(
    ("mask", "param", "message"),
    [
        (SQUARE, "mask", "mask has no transparency; make transparent what is to be drawn"),
        (Image.new("RGBA", (64, 64), "black"), "mask", "opaque all over"),
        (transparent(32, 64, (0, 0, 9, 9)), "mask", "the mask has 32x64 pixels and the picture 64x64"),
    ],
)
def test_masks_that_are_refused(client: openai.OpenAI, mask: Image.Image, param: str, message: str) -> None:
    call = lambda: client.images.edit(image=image_file(SQUARE), mask=image_file(mask), prompt="x")  # noqa: E731
    refused(call, 400, param, message)


def test_pictures_that_are_refused(place: Place, client: openai.OpenAI) -> None:
    def edit(image: Any, **fields: Any) -> Callable[[], Any]:
        return lambda: client.images.edit(image=image, prompt="x", **fields)

    place.front.settings = Settings(limits=Limits(upload_pixels=64 * 64, uploads=2))
    refused(edit(io.BytesIO(b"GIF89a is all that is here")), 400, "image", "image is not a picture that can be read")
    refused(edit(b""), 400, "image")
    large = image_file(Image.new("RGB", (65, 64)))
    refused(edit(large), 400, "image", "image is 4160 pixels (65x64), and this server takes at most 4096")
    three = [image_file(SQUARE) for _ in range(3)]
    refused(edit(three), 400, "image", "image is 3 pictures, and this server takes at most 2")
    refused(edit([image_file(SQUARE), image_file(SQUARE)], n=6), 400, "n", "n is 12 pictures")
    refused(edit(image_file(SQUARE), extra_body={"feather": 3}), 400, "feather", "about a mask")
    refused(edit(image_file(SQUARE), extra_body={"num_inference_steps": "many"}), 400, "num_inference_steps")
    for loras in ("{", [{"name": "a", "scale": 1}, {"name": "b"}], [{"scale": 1}], [{"name": "a", "scale": "much"}]):
        refused(edit(image_file(SQUARE), extra_body={"loras": loras}), 400, "loras", "loras is no such list")
    refused(edit(image_file(SQUARE), extra_body={"seed": [1, 2]}), 400, "seed[]", "more than once")
    markup = image_file(SQUARE)
    refused(edit(image_file(SQUARE), markup=markup), 400, "markup", "the picture 'markup' has no use here")
    assert not place.service.submitted


def test_a_field_that_is_given_twice(place: Place) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n'
    kind = "multipart/form-data; boundary=x"
    status, _, answer = place.ask("POST", "/v1/images/edits", part * 2 + b"--x--\r\n", content_type=kind)
    assert status == 400 and answer["error"]["message"] == "the field 'seed' is given more than once"


def test_a_form_that_is_none(place: Place) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary=é"):
        for body in (
            b"--y\r\nnothing",
            b"--x\r\n\r\n",
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
            b"--x",
        ):
            status, _, answer = place.ask("POST", "/v1/images/edits", body, content_type=kind)
            assert status == 400 and answer["error"]["message"].startswith(("the body is no", "prompt:")), answer


@pytest.mark.parametrize(
    ("error", "status", "code", "after", "again"),
    [
        (QueueFullError("full", retry_after=6.2), 429, "queue_full", "7", None),
        (NotReadyError("soon", retry_after=0.1), 503, "not_ready", "1", None),
        (NotReadyError("soon"), 503, "not_ready", "10", None),
        (OutOfMemoryError("large"), 503, "out_of_memory", None, "false"),
        (DeadlineError("late"), 504, "deadline_exceeded", None, "false"),
    ],
)
def test_what_the_service_refuses(
    place: Place, client: openai.OpenAI, error: Exception, status: int, code: str, after: str | None, again: str | None
) -> None:
    place.service.refusal = error
    for stream in (False, True):
        found = refused(lambda s=stream: client.images.generate(prompt="x", stream=s), status, None, str(error))  # type: ignore[misc]
        assert found.code == code
        headers = found.response.headers
        assert (headers.get("retry-after"), headers.get("x-should-retry")) == (after, again)


def test_a_client_comes_back_when_it_is_told_to(place: Place) -> None:
    place.service.refusal = QueueFullError("full", retry_after=0.5)
    threading.Timer(0.3, lambda: setattr(place.service, "refusal", None)).start()
    with place.client(max_retries=1) as client:
        assert client.images.generate(prompt="x").data


@pytest.mark.parametrize(
    "error", [DrawingError("numbers that are none"), WorkerDiedError("twice"), DeadlineError("late")]
)
def test_pictures_that_fail(place: Place, client: openai.OpenAI, error: Any) -> None:
    place.service.failure = error
    found = refused(lambda: client.images.generate(prompt="x", n=2), error.status, None, str(error))
    assert found.response.headers["x-should-retry"] == "false"
    with client.images.generate(prompt="x", stream=True) as stream, pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == error.code and str(error) in failed.value.message
    place.until(lambda: not place.service.running)


def test_what_nobody_expected_is_one_line_without_a_path(
    place: Place, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    place.service.refusal = FileNotFoundError("/home/someone/secret")
    with caplog.at_level(logging.ERROR, "calotype.serving.requests"):
        found = refused(lambda: client.images.generate(prompt="x"), 500, None, "something went wrong inside the server")
    assert "/home" not in str(found.body) and found.response.headers["x-should-retry"] == "false"
    place.until(lambda: caplog.records)
    (line,) = caplog.records
    assert line.exc_info is not None and vars(line)["fields"]["id"] == found.request_id
    place.service.refusal, place.service.failure = None, ZeroDivisionError("/home")
    with client.images.generate(prompt="x", stream=True) as stream, pytest.raises(openai.APIError) as failed:
        list(stream)
    assert "something went wrong" in failed.value.message


def test_deadlines(place: Place, client: openai.OpenAI) -> None:
    place.service.held = True
    found = refused(lambda: client.images.generate(prompt="x", extra_body={"deadline": 0.1}), 504)
    assert found.code == "deadline_exceeded" and place.service.cancelled == []


def test_models_that_are_not_there_or_not_open(place: Place, client: openai.OpenAI) -> None:
    missing = refused(lambda: client.images.generate(prompt="x", model="dall-e-3"), 404, None, "valid: talbot")
    assert missing.code == "model_not_found" and isinstance(missing, openai.NotFoundError)
    place.service.change("talbot", ready=False, why="it is being opened")
    refused(lambda: client.images.generate(prompt="x"), 503, None, "it is being opened")


def test_paths_and_methods_that_are_not_there(client: openai.OpenAI) -> None:
    refused(lambda: client.post("/images/variations", body={}, cast_to=object), 404)
    found = refused(lambda: client.get("/images/generations", cast_to=object), 405)
    assert found.response.headers["allow"] == "POST"
    refused(lambda: client.get("/models/", cast_to=object), 404)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_pictures_with_it(place: Place, stream: bool) -> None:
    place.service.step_seconds = 0.05

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{place.url}/v1", api_key="x", max_retries=0) as client:

            async def ask() -> None:
                answer: Any = await client.images.generate(prompt="x", n=2, stream=stream)  # type: ignore[call-overload]
                if stream:
                    async for _ in answer:
                        pass

            asking = asyncio.create_task(ask())
            while len(place.service.running) < 2:
                await asyncio.sleep(0.005)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking

    asyncio.run(leave())
    place.until(lambda: len(place.service.cancelled) == 2 and not place.service.running)
    assert place.service.load.waiting == 0


def test_of_several_pictures_one_that_fails_takes_the_others_back(place: Place, client: openai.OpenAI) -> None:
    place.service.held = True
    refused(lambda: client.images.generate(prompt="x", n=3, extra_body={"deadline": 0.2}), 504)
    place.until(lambda: place.service.load.waiting == 0)


def test_a_stream_that_waits_says_that_it_is_there(place: Place) -> None:
    place.service.held = True
    place.front.settings = Settings(limits=Limits(keep_alive_seconds=0.05))
    threading.Timer(0.3, lambda: setattr(place.service, "held", False)).start()
    with place.client() as client, client.images.with_streaming_response.generate(prompt="x", stream=True) as answer:
        lines = list(answer.iter_lines())
    assert lines.count(": keep-alive") >= 2 and lines.count("event: image_generation.completed") == 1
