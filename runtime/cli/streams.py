"""Standard streams as they can be: closed, not UTF-8, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class PrintingError(OSError):
    """The result cannot be printed; any other OSError is about something else."""


class _Output(io.FileIO):
    """A stream's file, whose troubles are told from others."""

    def write(self, data: Any) -> int:
        """See ``io.RawIOBase``."""
        try:
            return super().write(data)
        except OSError as error:
            raise PrintingError(error.errno, error.strerror) from None


def prepare_streams() -> None:
    """Make the standard streams fit to be used; to be called once, before anything is opened.

    One that is closed becomes the null device: the next file that is opened would else get its number, and what
    libraries print would go into a picture. Characters that a stream's encoding has not are written as escapes. What
    cannot be printed on stdout is a :class:`PrintingError`.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor)
            setattr(sys, name, None)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _told_apart(sys.stdout)


def drop_results() -> None:
    """Let go of what stdout did not take: it would fail once more when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _open_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _told_apart(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream with errors of its own."""
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
