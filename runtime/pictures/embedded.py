"""The settings that a picture carries, wherever its program put them.

AUTOMATIC1111's web interface and Calotype write a text into a PNG's chunk or an EXIF comment, Civitai likewise, and
ComfyUI its graph as JSON. What is none of these is not settings, whatever place it has.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.opening import open_data, read_bounded, reading
from calotype.runtime.pictures.parameters import parse_parameters

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 2**18
MAX_TEXT = 2**24
EXIF_IFD = 0x8769
USER_COMMENT = 0x9286
# Where else people's programs put texts: ImageDescription; Make and Model, ComfyUI's choice in WebP; XPComment.
OTHER_TAGS = (0x010E, 0x010F, 0x0110, 0x9C9C)
# The first eight bytes of a comment, which name its encoding, and not always truly.
PREFIXES = (b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8)
ENCODINGS = ("utf-8-sig", "utf-16-be", "utf-16-le", "shift_jis", "latin-1")
GRAPH_LABELS = ("prompt:", "workflow:", "Prompt:", "Workflow:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """What ComfyUI writes of itself.

    Attributes:
        text: JSON.
        nodes: the kinds of its nodes.
    """

    text: str
    nodes: tuple[str, ...]


def read_settings(path: Path) -> str | Graph:
    """The settings in a picture: a text that :func:`parse_parameters` reads, or else a graph.

    Raises:
        InputError: the file is no picture, or carries none.
    """
    return settings_in(read_bounded(path), str(path))


def settings_in(data: bytes, name: str) -> str | Graph:
    """The same of a file's content, which errors call by ``name``."""
    texts = []
    with reading(name):
        for found in _png_texts(data) if data.startswith(SIGNATURE) else _other_texts(data, name):
            texts += _decoded(found) if isinstance(found, bytes) else [found]
    for read in (_settings, _graph):
        for text in texts:
            known = read(text)
            if known is not None:
                return known
    raise InputError(f"{name} carries no settings; pictures made by Calotype or AUTOMATIC1111 do")


def read_parameters(path: Path) -> str:
    """The settings text in a picture; raises InputError where it has none."""
    found = read_settings(path)
    if isinstance(found, Graph):
        raise InputError(f"{path} carries a graph of ComfyUI and no settings; Calotype does not run graphs")
    return found


def _settings(text: str) -> str | None:
    text = text.strip("\0\ufeff")
    try:
        parse_parameters(text)
    except InputError:
        return None
    return text


def _graph(text: str) -> Graph | None:
    text = text.strip("\0\ufeff")
    for label in GRAPH_LABELS:
        text = text.removeprefix(label)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    listed = value.get("nodes")
    nodes, kind = (listed, "type") if isinstance(listed, list) else (value.values(), "class_type")
    kinds = tuple(str(node[kind]) for node in nodes if isinstance(node, dict) and kind in node)
    return Graph(text=text, nodes=kinds) if kinds else None


def _decoded(comment: bytes) -> list[str]:
    """What the bytes of an EXIF comment can mean: writers disagree about encodings, and about what they say of them."""
    for prefix in PREFIXES:
        comment = comment.removeprefix(prefix)
    found = []
    for encoding in ENCODINGS:
        try:
            found.append(comment.decode(encoding))
        except ValueError:
            continue
    return found


def _other_texts(data: bytes, name: str) -> Iterator[str | bytes]:
    image = open_data(data, name)
    yield from _exif_texts(image.getexif())
    comment = image.info.get("comment")
    if isinstance(comment, str | bytes):
        yield comment


def _exif_texts(exif: Any) -> Iterator[str | bytes]:
    for value in (exif.get_ifd(EXIF_IFD).get(USER_COMMENT), *(exif.get(tag) for tag in OTHER_TAGS)):
        if isinstance(value, str):
            yield value.encode("latin-1", errors="replace")  # as which Pillow reads it, whatever it is
        elif isinstance(value, bytes):
            yield value


def _png_texts(data: bytes) -> Iterator[str | bytes]:
    """Those before and behind the image data, which need not be decoded; chunks that are damaged are passed over."""
    position, left = len(SIGNATURE), MAX_TEXT
    for _ in range(MAX_CHUNKS):
        if position + 12 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf") and end + 4 <= len(data):
            content = data[position + 8 : end]
            if zlib.crc32(kind + content) == int.from_bytes(data[end : end + 4]):
                for text in _chunk_texts(kind, content, left):
                    left -= len(text)
                    yield text
        position = end + 4


def _chunk_texts(kind: bytes, content: bytes, left: int) -> Iterator[str | bytes]:
    if kind == b"eXIf":
        exif = Image.Exif()
        exif.load(content)
        yield from _exif_texts(exif)
        return
    keyword, _, rest = content.partition(b"\0")
    if keyword == b"XML:com.adobe.xmp":  # a packet whose text would be taken for a prompt with its tags
        return
    if kind == b"zTXt":
        rest = _inflated(rest[1:], left)
    elif kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:]
        for _ in range(2):  # language, and keyword in that language
            rest = rest.partition(b"\0")[2]
        rest = _inflated(rest, left) if packed else rest
    try:  # programs write UTF-8 where the specification has Latin-1
        yield rest.decode("utf-8")
    except ValueError:
        yield rest.decode("latin-1")


def _inflated(data: bytes, limit: int) -> bytes:
    try:
        text = zlib.decompressobj().decompress(data, limit + 1)
    except zlib.error:
        return b""
    if len(text) > limit:
        raise ValueError(f"its texts have more than {MAX_TEXT} bytes")
    return text
