"""The tensors of a file, whatever its name ends in: what it is, is read off its first bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from calotype.export.pickles import read_pickle
from calotype.export.quantised import plain
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError
from calotype.runtime.untrusted import open_regular, why, zip_trouble

# What the files are called whose tensors are read.
SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
# What a file can be that a download or a clone left in the place of another.
_PLACEHOLDERS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull",
    ),
    (b"<!doctype html", "is a web page, not the file itself; log in and accept the terms where it was fetched from"),
    (b"<html", "is a web page, not the file itself; log in and accept the terms where it was fetched from"),
    (b"<?xml", "is a server's error, not the file itself; log in and accept the terms where it was fetched from"),
    (b'{"error"', "is a server's error, not the file itself; log in and accept the terms where it was fetched from"),
)
_OTHERS = (
    (b"GGUF", "holds GGUF weights, which are not read; fetch this model as .safetensors"),
    (b"\x1f\x8b", "is an archive; unpack it, and give what is in it"),
    (b"Rar!", "is an archive; unpack it, and give what is in it"),
    (b"7z\xbc\xaf", "is an archive; unpack it, and give what is in it"),
    (b"\xfd7zXZ", "is an archive; unpack it, and give what is in it"),
    (b"\x28\xb5\x2f\xfd", "is an archive; unpack it, and give what is in it"),
    (b"\x89HDF", "holds weights of Keras, which are not read; fetch this model as .safetensors"),
)
DTYPE_UNKNOWN = re.compile("Dtype not understood|unknown variant")  # as the library says it
_LARGEST_HEADER = 100_000_000  # of safetensors, by its own library


def read_tensors(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """The tensors of a file as plain numbers, mapped into memory where they can be, and its header's metadata.

    Raises:
        CheckpointError: it is broken, something else, or a pickle that asks for more than tensors.
    """
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download it") from None
    except OSError as error:
        message = f"{path} cannot be read: {why(error)}; see that it is a file that you may read"
        raise CheckpointError(message) from error
    if _is_safetensors(head):
        state, metadata = _read_safetensors(path)
    elif head.startswith((b"PK\x03\x04", b"\x80")):
        trouble = zip_trouble(path) if head.startswith(b"PK") else None
        if trouble is not None:
            raise UnsupportedArchitectureError(f"{path} {trouble}")
        state, metadata = read_pickle(path), {}
    else:
        check_whole(path, head)
        for beginning, what in _OTHERS:
            if head.startswith(beginning):
                raise UnsupportedArchitectureError(f"{path} {what}")
        raise CheckpointError(
            f"{path} is of an unknown kind; valid: a folder, {', '.join(SUFFIXES)}; it begins with {head[:16]!r}"
        )
    return plain(state, path), metadata


def check_whole(path: Path, head: bytes) -> None:
    """Raise CheckpointError where a file that begins with ``head`` only stands in for another, or is empty."""
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    for beginning, what in _PLACEHOLDERS:
        if head.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path} {what}")


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _LARGEST_HEADER


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            return state, file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error
    except SafetensorError as error:
        if DTYPE_UNKNOWN.search(str(error)):
            message = f"{path} holds tensors of a dtype that is not read ({why(error)}); fetch this model in 16 bits"
            raise UnsupportedArchitectureError(message) from error
        raise CheckpointError(f"{path} cannot be read: {why(error)}; download it again") from error
