"""Bodies are read here, whole, before anything looks at them: bounded in bytes, one and all together, and in time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype.serving.errors import CancelledError, NotReadyError, RequestRefusedError, SlowError, TooLargeError
from calotype.serving.http.limits import Limits


class Bodies:
    """The layer that reads them, and gives them on in the pieces that they came in."""

    def __init__(self, app: ASGIApp, limits: Callable[[], Limits]) -> None:
        self._app, self._limits = app, limits
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits, pieces = self._limits(), deque[bytes]()
        _check_length(scope, limits)
        try:
            async with asyncio.timeout(limits.body_seconds):
                await self._read(receive, pieces, limits)
        except TimeoutError:
            self._held -= sum(map(len, pieces))
            raise SlowError(f"the body did not arrive within {limits.body_seconds:g} seconds") from None
        except BaseException:
            self._held -= sum(map(len, pieces))
            raise

        async def replay() -> Message:
            if not pieces:
                return await receive()
            piece = pieces.popleft()
            self._held -= len(piece)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        try:
            await self._app(scope, replay, send)
        finally:
            self._held -= sum(map(len, pieces))

    async def _read(self, receive: Receive, pieces: deque[bytes], limits: Limits) -> None:
        """Fill ``pieces``, of which there is one at least."""
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CancelledError("the client left before its request was whole")
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > limits.body_bytes:
                raise _too_large(limits)
            if self._held + len(piece) > limits.bodies_bytes:
                raise NotReadyError("so much is being sent at once that there is no memory for more", retry_after=5)
            if piece or not more:
                pieces.append(piece)
                self._held += len(piece)


def _check_length(scope: Scope, limits: Limits) -> None:
    """Refuse what says of itself that it is too large before any of it is read."""
    said = dict(scope["headers"]).get(b"content-length", b"0")
    if not said.isdigit():
        raise RequestRefusedError("the header Content-Length is no number")
    if len(said) > 18 or int(said) > limits.body_bytes:
        raise _too_large(limits)


def _too_large(limits: Limits) -> TooLargeError:
    return TooLargeError(f"the body has more than {limits.body_bytes} bytes; send smaller pictures")
