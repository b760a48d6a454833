"""What decoding a picture may cost, told before it begins: a few bytes can ask for hours, or all of the memory."""

from __future__ import annotations

import re
import struct

from PIL import Image

from calotype.runtime.errors import InputError

MAX_PIXELS = 2**26  # 8192 x 8192: at sixteen bytes each in the worst case, WebP, a gigabyte
# Each scan of a progressive JPEG goes over all pixels, and takes a few bytes to ask for. People's have about ten.
MAX_SCANNED = 2**30
MAX_SLOW_PIXELS = 2**21  # of run-length encoded BMP, which Pillow decodes in Python
MAX_EXIF = 64  # segments of a JPEG: Pillow joins each to those before, in time that grows with their square
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart, which lie within a scan
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
WITHOUT_LENGTH = {0x01, 0xD8}
TILE_WIDTH, TILE_LENGTH = 322, 323
BIG_TIFF = 43
# Bytes of one value of each type of TIFF that has more than one.
TAG_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def check_size(image: Image.Image, name: str) -> None:
    """Raises InputError where the picture is too large to be decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{name} has more than {MAX_PIXELS} pixels; scale it down first")


def check_segments(data: bytes, name: str) -> None:
    """Raises InputError where looking at the head of the picture in the file ``data`` would take long."""
    if data.startswith(b"\xff\xd8") and data.count(b"Exif\0\0") > MAX_EXIF:
        raise InputError(f"{name} has more EXIF data than a photograph needs; save it as PNG")


def check_work(image: Image.Image, data: bytes, name: str) -> None:
    """Raises InputError where the picture in the file ``data`` would cost much more than its size tells."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        work, most, what = pixels * _scans(data), MAX_SCANNED, "scans"
    elif image.format == "TIFF":
        if _tag_bytes(data) > len(data):
            raise InputError(f"{name} has tags that share their data; save it as PNG")
        work, most, what = _tiled(image), MAX_PIXELS, "pixels in tiles"
    elif any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
        work, most, what = pixels, MAX_SLOW_PIXELS, "run-length encoded pixels"
    else:
        return
    if work > most:
        raise InputError(f"{name} has more {what} than a picture of {image.width}x{image.height} needs; save it as PNG")


def _scans(data: bytes) -> int:
    """How many the first picture of a JPEG file has."""
    scans, position = 0, 2
    while (marker := MARKER.search(data, position)) is not None:
        kind, position = data[marker.end() - 1], marker.end()
        if kind == END_OF_IMAGE:
            break
        scans += kind == START_OF_SCAN
        if kind not in WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2])
    return scans


def _tag_bytes(data: bytes) -> int:
    """Bytes of all tags of a TIFF file's first picture, counted as often as they are named: libtiff reads them so."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == BIG_TIFF
    number, entry = ("Q", f"{order}HHQQ") if big else ("H", f"{order}HHLL")
    offset = struct.unpack_from(f"{order}Q", data, 8)[0] if big else struct.unpack_from(f"{order}L", data, 4)[0]
    start, size = offset + struct.calcsize(f"{order}{number}"), struct.calcsize(entry)
    count = min(struct.unpack_from(f"{order}{number}", data, offset)[0], (len(data) - start) // size)
    entries = struct.iter_unpack(entry, data[start : start + count * size])
    lengths = (TAG_SIZES.get(kind, 1) * length for _, kind, length, _ in entries)
    return sum(length for length in lengths if length > (8 if big else 4))


def _tiled(image: Image.Image) -> int:
    """Pixels of all tiles of a TIFF file: those at its edges reach beyond it, by as much as it likes."""
    tags = getattr(image, "tag_v2", {})
    width, length = (max(int(tags.get(tag, 1)), 1) for tag in (TILE_WIDTH, TILE_LENGTH))
    return -(-image.width // width) * width * (-(-image.height // length) * length)
