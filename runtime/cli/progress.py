"""How far a call is: a bar on a terminal, and elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from calotype.runtime.picture import StepEnd

SECONDS = 10.0  # between two lines


class Progress:
    """Told of every step of a call's pictures, writes to stderr; a context manager.

    Args:
        pictures: how many the call draws.
    """

    def __init__(self, pictures: int) -> None:
        self._pictures, self._done = pictures, 0
        self._bar: Any = click.progressbar(length=1, label="denoising", file=sys.stderr)
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._said = time.monotonic()

    def advance(self, end: StepEnd) -> None:
        """See :data:`calotype.runtime.call.Callback`."""
        self._done += 1
        whole = end.steps * self._pictures
        if self._on_terminal:
            self._bar.length = whole
            self._bar.update(1)
        elif time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            click.echo(f"denoising: {self._done} of {whole} steps", err=True)

    def __enter__(self) -> Self:
        if self._on_terminal:
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_terminal:
            self._bar.__exit__(kind, error, trace)
