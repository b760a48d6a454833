"""Picture files made by hand: what no well-behaved program would write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image

GREY, RGB = 0, 2


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colours: int = RGB,
    data: bytes = b"",
    before: bytes = b"",
    behind: bytes = b"",
) -> bytes:
    """A PNG file of rows that begin with their filter, and chunks before and behind them."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
        + before
        + chunk(b"IDAT", zlib.compress(data))
        + behind
        + chunk(b"IEND", b"")
    )


def small_png(*, before: bytes = b"", behind: bytes = b"") -> bytes:
    """One black pixel."""
    return png(1, 1, data=b"\0" * 4, before=before, behind=behind)


def tiff(entries: Sequence[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF file with ``data`` at offset 8, and a directory of (tag, type, count, value)."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + b"\0" * 4


def encoded(kind: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    """A red picture as Pillow writes it."""
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind, **options)
    return file.getvalue()
