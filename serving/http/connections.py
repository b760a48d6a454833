"""Connections that are cut off when a client sends or takes too little: uvicorn's own, with three timers more."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from calotype.serving.http.limits import Limits

SLOWEST = 1024  # bytes a second that a client takes of its answer at least, once buffers are full


def connections(limits: Limits) -> type[asyncio.Protocol]:
    """A class for ``uvicorn.Config(http=…)`` whose connections keep to ``limits``.

    A request's lines have to arrive within ``header_seconds``; the rest of a body that was refused within
    ``body_seconds``; and an answer has to be taken by a kilobyte a second, looked at every ``stalled_seconds``.
    """

    class Connection(H11Protocol):
        _lines: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            if self._lines is None and self.conn.their_state is h11.IDLE:
                self._expect()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
                self._stop()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
                self._expect(limits.body_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None
            super().resume_writing()

        def _expect(self, seconds: float = limits.header_seconds) -> None:
            self._stop()
            self._lines = self.loop.call_later(seconds, self.transport.abort)

        def _stop(self) -> None:
            if self._lines is not None:
                self._lines.cancel()
                self._lines = None

        def _watch(self, size: int) -> None:
            self._stalled = self.loop.call_later(limits.stalled_seconds, self._check, size)

        def _check(self, before: int) -> None:
            now = self.transport.get_write_buffer_size()
            if before - now < SLOWEST * limits.stalled_seconds:
                self.transport.abort()
            else:
                self._watch(now)

    return Connection
