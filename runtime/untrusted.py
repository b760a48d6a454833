"""Files that others wrote, read without trusting them: regular files alone, by handle, no more than a bound."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from calotype.runtime.errors import quoted, shortened

MOST_DIGITS = 19  # of a whole number: what 64 bits hold
LONGEST = 200  # characters of what somebody else's exception says


def open_regular(path: Path, flags: int = 0) -> BufferedReader:
    """Open a file for reading; a pipe, on which one would wait, and a device, which may never end, are an OSError.

    Args:
        path: the file.
        flags: more of those that ``os.open`` takes.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "It is a pipe, a device or a socket, not a file", str(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, most: int) -> bytes:
    """The contents of a regular file of at most ``most`` bytes; anything else is an OSError."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"It is larger than {most / 2**20:g} MiB", str(path))
    return data


def why(error: Exception) -> str:
    """What an exception says, in one line of a bounded length."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shortened(" ".join(text.split()), LONGEST)


def parse_json(data: bytes) -> Any:
    """The value in a JSON text in UTF-8.

    Numbers that 64 bits do not hold, and a key that an object has twice, are what readers of JSON understand
    differently: they are refused, and so is what is nested too deep to be read.

    Raises:
        ValueError: it is no such text; the message is one line of a bounded length.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_refused,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {quoted(next(key for key in keys if keys.count(key) > 1))} twice")
    return found


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"it has a whole number of {len(text.lstrip('-'))} digits; valid: up to {MOST_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text[:20]}, which is too large")
    return value


def _refused(text: str) -> float:
    raise ValueError(f"it has {text}, which is no JSON")
