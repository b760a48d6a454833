"""Files that others wrote, read without trusting them: regular files alone, by handle, no more than a bound."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import tomllib
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import Any

from calotype.runtime.errors import InputError, quoted, shortened

MOST_DIGITS = 19  # of a whole number: what 64 bits hold
MOST_DOTS = 500  # of a line of TOML: tomllib takes the square of a key's parts
MOST_SETTINGS = 1 << 16  # bytes of a file of settings
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how they begin
MOST_CONTENTS = 16 << 20  # bytes of a zip file's list of contents; a checkpoint of PyTorch has a tenth of one
LONGEST = 200  # characters of what somebody else's exception says


def open_regular(path: Path, flags: int = 0, folder: int | None = None) -> BufferedReader:
    """Open a file for reading; a pipe, on which one would wait, and a device, which may never end, are an OSError.

    Args:
        path: the file.
        flags: more of those that ``os.open`` takes.
        folder: an open folder that ``path`` begins at; None is the working directory.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=folder)
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
        # One that grows, or says that it is empty as those of /proc do, is found too large when it is read.
        too_large = os.fstat(file.fileno()).st_size > most
        data = b"" if too_large else file.read(most + 1)
    if too_large or len(data) > most:
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


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file of settings in TOML.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        text = read_bytes(path, MOST_SETTINGS).decode("utf-8")
        if any(line.count(".") > MOST_DOTS for line in text.split("\n")):
            raise ValueError(f"it has a line of more than {MOST_DOTS} dots; use fewer")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except RecursionError:
        raise InputError(f"{path} is not a file of settings in TOML: it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a file of settings in TOML: {why(error)}") from error


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


class _Sips(io.FileIO):
    """A file of which no more than ``MOST_CONTENTS`` is read at once: a zip file's list of contents is read whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        """See :meth:`io.FileIO.read`; raises ValueError where that is more."""
        most = MOST_CONTENTS + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) == most:
            raise ValueError(f"its list of contents has more than {MOST_CONTENTS >> 20} MiB")
        return data


def zip_trouble(path: Path) -> str | None:
    """What a zip file is in which no tensors were pickled, and what to do; None for one in which they were.

    PyTorch packs nothing: it maps tensors from the file. What is packed can be a thousand times as large unpacked.
    """
    try:
        with open_regular(path) as opened, zipfile.ZipFile(_Sips(opened.fileno(), closefd=False)) as file:
            entries = file.infolist()
    except ValueError as error:
        return f"is a zip file that is not read: {why(error)}; fetch the weights as .safetensors"
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return None  # cut short, as its reader will say
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        return "is a program of TorchScript, which is not run; fetch its weights as .safetensors"
    if "data.pkl" not in names:
        return "is an archive; unpack it, and give what is in it"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "holds packed tensors, which PyTorch does not write; fetch the weights as .safetensors"
    return None


def stand_in(path: Path) -> str | None:
    """What lies in the place of a file of weights, and what to do; None where that cannot be told."""
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except (OSError, ValueError):
        return None
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the file it stands for; run: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page that was saved in the file's place; download the file itself, signed in if need be"
    if start.startswith(b"PK\x03\x04"):
        return zip_trouble(path)
    if start and len(start) < 512 and start.isascii() and start.decode().isprintable():
        return f"is no file of weights but the text {start.decode()[:80]!r}; download it again"
    return None


def is_pickle(path: Path) -> bool:
    """Whether a file is one of Python's pickles, bare or as PyTorch packs them; a zip file counts."""
    try:
        with open_regular(path) as file:
            return file.read(4).startswith(PICKLES)
    except (OSError, ValueError):
        return False
