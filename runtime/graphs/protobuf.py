"""Protocol buffers on the wire, as far as ONNX files use them (https://protobuf.dev/programming-guides/encoding/)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MOST_TAG, TAG_BYTES = 1 << 32, 5
Value = int | memoryview


def fields(message: memoryview) -> Iterator[tuple[int, int, Value]]:
    """(number, wire type, value) of each field: an integer, or the bytes of whatever else.

    Raises:
        IndexError: the message is cut off, or no protocol buffer, or has a tag that 32 bits do not hold, of which other
            readers take the lower ones: they would see another field than this one does.
    """
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if tag >= MOST_TAG or position - start > TAG_BYTES or number == 0:
            raise IndexError
        if wire == VARINT:
            value, position = _varint(message, position)
            yield number, wire, value
            continue
        if wire == LENGTH:
            length, position = _varint(message, position)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise IndexError
        if position + length > len(message):
            raise IndexError
        yield number, wire, message[position : position + length]
        position += length


def field(number: int, value: int | float | str | bytes | memoryview) -> bytes:
    """One field, ready to be joined to others: an integer as a varint, a float as four bytes, the rest by length."""
    if isinstance(value, int):
        return _encoded(number << 3 | VARINT) + _encoded(value % (1 << 64))
    if isinstance(value, float):
        return _encoded(number << 3 | FIXED32) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else bytes(value)
    return _encoded(number << 3 | LENGTH) + _encoded(len(data)) + data


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            if value >> 64:
                raise IndexError
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
