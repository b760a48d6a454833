"""Pictures as OpenAI's clients are given them: in one answer, or as the events of a stream."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request, Response

from calotype.serving.http.answers import Answer, envelope
from calotype.serving.http.drawing import Drawing, Front, all_drawn, unless_gone
from calotype.serving.http.events import Event, EventStream
from calotype.serving.http.images import encoded, tokens
from calotype.serving.http.logs import note
from calotype.serving.openai.fields import Wanted
from calotype.serving.tasks import Drawn, Pixels, Started, Stepped


async def answered(
    front: Front, request: Request, body: Wanted, drawings: Sequence[Drawing], kind: str, uploaded: int = 0
) -> Response:
    """The pictures in one answer, or one after the other in a stream.

    Args:
        front: of the server.
        request: of HTTP.
        body: what it asks for.
        drawings: the pictures.
        kind: what the names of its events begin with.
        uploaded: tokens of the pictures that were sent.

    Raises:
        ServingError: why there is no picture, or that nobody waits for it.
    """
    if body.stream:
        events = _events(request, body, drawings, kind, uploaded)
        return EventStream(events, front.limits.keep_alive_seconds, lambda: _drop(drawings))
    try:
        pictures, files = await unless_gone(request.receive, _whole(body, drawings))
    finally:
        _drop(drawings)
    data = [_datum(front, request, body, file, picture) for file, picture in zip(files, pictures, strict=True)]
    answer = {
        "created": int(time.time()),
        "background": "opaque",
        "data": data,
        "output_format": body.format,
        "size": _size(pictures[0].pixels),
        "usage": _usage(pictures, uploaded),
        **_said(body),
    }
    return Answer(answer)


def _drop(drawings: Sequence[Drawing]) -> None:
    for drawing in drawings:
        drawing.drop()


async def _whole(body: Wanted, drawings: Sequence[Drawing]) -> tuple[list[Drawn], list[bytes]]:
    """The pictures and their files."""
    pictures = await all_drawn(drawings)
    files = [encoded(own.pixels, own.parameters, body.format, body.output_compression) for own in pictures]
    return pictures, list(await asyncio.gather(*files))


async def _events(
    request: Request, body: Wanted, drawings: Sequence[Drawing], kind: str, uploaded: int
) -> AsyncGenerator[Event]:
    """Events of all pictures as they come; ``index`` says which picture each is of. Steps are comments between them."""
    queue: asyncio.Queue[tuple[int, Stepped | Drawn | None]] = asyncio.Queue()
    followers = [asyncio.ensure_future(_follow(own, number, queue)) for number, own in enumerate(drawings)]
    counts = [0] * len(drawings)
    try:
        left = len(drawings)
        while left:
            number, event = await queue.get()
            if event is None:
                await followers[number]  # raises what it failed with
                left -= 1
                continue
            if isinstance(event, Stepped) and event.preview is None:
                yield f"step {event.step}/{event.steps} of {number}"
                continue
            last = isinstance(event, Drawn)
            name = f"{kind}.{'completed' if last else 'partial_image'}"
            value = await _event(body, event, uploaded)
            value |= {"type": name, "index": number}
            if not last:
                value["partial_image_index"] = counts[number]
                counts[number] += 1
            yield name, value
    except Exception as error:
        note(request.scope, error)
        yield "error", envelope(error)
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)


async def _follow(drawing: Drawing, number: int, queue: asyncio.Queue[tuple[int, Stepped | Drawn | None]]) -> None:
    try:
        async with contextlib.aclosing(drawing.events()) as events:
            async for event in events:
                if not isinstance(event, Started):
                    queue.put_nowait((number, event))
    finally:
        queue.put_nowait((number, None))


async def _event(body: Wanted, event: Stepped | Drawn, uploaded: int) -> dict[str, Any]:
    pixels = event.pixels if isinstance(event, Drawn) else event.preview
    assert pixels is not None
    text = event.parameters if isinstance(event, Drawn) else ""
    file = await encoded(pixels, text, body.format, body.output_compression)
    value: dict[str, Any] = {
        "b64_json": base64.b64encode(file).decode(),
        "created_at": int(time.time()),
        "size": _size(pixels),
        "quality": "auto",
        "background": "opaque",
        "output_format": body.format,
        **_said(body),
    }
    if isinstance(event, Drawn):
        value |= {"usage": _usage([event], uploaded), "seed": event.request.get("seed")}
    return value


def _datum(front: Front, request: Request, body: Wanted, file: bytes, picture: Drawn) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": picture.request.get("seed")}
    if body.response_format == "url":
        found["url"] = f"{request.base_url}v1/images/kept/{front.kept.keep(file, body.format)}"
    else:
        found["b64_json"] = base64.b64encode(file).decode()
    return found


def _usage(pictures: Sequence[Drawn], uploaded: int) -> dict[str, Any]:
    """Tokens of the prompt, once, and of pictures: their patches."""
    text = max((own.tokens for own in pictures), default=0)
    drawn = sum(tokens((own.pixels.shape[1], own.pixels.shape[0])) for own in pictures)
    return {
        "input_tokens": text + uploaded,
        "input_tokens_details": {"image_tokens": uploaded, "text_tokens": text},
        "output_tokens": drawn,
        "output_tokens_details": {"image_tokens": drawn, "text_tokens": 0},
        "total_tokens": text + uploaded + drawn,
    }


def _said(body: Wanted) -> dict[str, Any]:
    """What a request said and its answer repeats."""
    own = {"quality": body.quality, "safety_identifier": body.safety_identifier or body.user}
    return {name: value for name, value in own.items() if value}


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
