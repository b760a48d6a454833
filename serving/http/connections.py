"""Connections that are cut off when a client sends or takes too little: uvicorn's own, with three timers more."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from calotype.serving.http.limits import Limits

SLOWEST = 1024  # bytes a second that a client takes of its answer at least, once buffers are full


class Bounded(Protocol):
    """What has limits, which may change."""

    @property
    def limits(self) -> Limits:
        """As they are now."""
        ...


class Connection(H11Protocol):
    """One that keeps to the limits that there are at the time.

    A request's lines have to arrive within ``header_seconds``; the rest of a body that was refused within
    ``body_seconds``; and an answer has to be taken by a kilobyte a second, looked at every ``stalled_seconds``.
    """

    bounded: ClassVar[Bounded]
    _lines: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`; so for those below."""
        super().connection_made(transport)
        self._expect(self.bounded.limits.header_seconds)

    def data_received(self, data: bytes) -> None:
        """Part of a request."""
        if self._lines is None and self.conn.their_state is h11.IDLE:
            self._expect(self.bounded.limits.header_seconds)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop()

    def on_response_complete(self) -> None:
        """The answer is written; there may be a body that nobody has read."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._expect(self.bounded.limits.body_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, from here or from there."""
        self._stop()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Buffers are full."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """They are no longer."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _expect(self, seconds: float) -> None:
        self._stop()
        self._lines = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._lines is not None:
            self._lines.cancel()
            self._lines = None

    def _watch(self, size: int) -> None:
        seconds = self.bounded.limits.stalled_seconds
        self._stalled = self.loop.call_later(seconds, self._check, size, seconds)

    def _check(self, before: int, seconds: float) -> None:
        now = self.transport.get_write_buffer_size()
        if before - now < SLOWEST * seconds:
            self.transport.abort()
        else:
            self._watch(now)


def connections(bounded: Bounded) -> type[asyncio.Protocol]:
    """A class of :class:`Connection` for ``uvicorn.Config(http=…)``; it keeps to what ``bounded`` says."""
    return type("Connection", (Connection,), {"bounded": bounded})
