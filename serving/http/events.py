"""Server-sent events: a stream that says while it waits that it is still there, and ends where its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from calotype.serving.errors import CancelledError
from calotype.serving.http.drawing import unless_gone

Event = tuple[str, dict[str, Any]] | str  # a name and a value, or a comment, which programs pass over
KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """An answer of events as they come.

    Args:
        events: a name and a value for each, or a comment; a name "" is left out. Is closed when the client leaves. What
            goes wrong has to be an event too: the answer has begun.
        keep_alive: after so many seconds without an event, a comment is sent.
        end: is called when it is over, however it ends; also where it never began.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event], keep_alive: float, end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._keep_alive, self._end = events, keep_alive, end
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            with contextlib.suppress(CancelledError):  # the client has left, and nobody is there to be told so
                await unless_gone(receive, self._send(send))
        finally:
            self._end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        coming = asyncio.ensure_future(_next(self._events))
        try:
            while True:
                await asyncio.wait((coming,), timeout=self._keep_alive)
                if not coming.done():
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    continue
                event = coming.result()
                if event is None:
                    break
                coming = asyncio.ensure_future(_next(self._events))
                await send({"type": "http.response.body", "body": _line(event), "more_body": True})
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b""})


async def _next(events: AsyncGenerator[Event]) -> Event | None:
    return await anext(events, None)


def _line(event: Event) -> bytes:
    if isinstance(event, str):
        return f": {event}\n\n".encode()
    name, value = event
    data = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()
