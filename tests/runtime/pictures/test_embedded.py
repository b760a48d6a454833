"""Settings in pictures of other programs, and what is none."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.embedded import Graph, read_parameters, read_settings
from tests.runtime.pictures.samples import chunk, encoded, png, small_png
from tests.runtime.pictures.test_parameters import AUTOMATIC1111, CIVITAI, TEXT

ACCENTED = "ein Äpfelchen 🍎\nSteps: 3, Sampler: Euler"
LATIN = "caf\xe9\nSteps: 3, Sampler: Euler"
GRAPH = {"3": {"class_type": "KSampler", "inputs": {"seed": 5}}, "4": {"class_type": "SaveImage", "inputs": {}}}
WORKFLOW = {"nodes": [{"id": 1, "type": "KSampler"}, {"id": 2, "type": "VAEDecode"}], "links": []}
CHUNKS = {
    "tEXt": lambda text: chunk(b"tEXt", b"parameters\0" + text.encode()),
    "zTXt": lambda text: chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text.encode())),
    "iTXt": lambda text: chunk(b"iTXt", b"parameters\0\0\0en\0word\0" + text.encode()),
    "packed iTXt": lambda text: chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(text.encode())),
}


def read(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return read_parameters(path)


@pytest.mark.parametrize("text", [TEXT, AUTOMATIC1111, CIVITAI, ACCENTED])
@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_before_and_behind_the_image_data(tmp_path: Path, kind: str, text: str) -> None:
    own = CHUNKS[kind](text)
    assert read(tmp_path / "a.png", small_png(before=own)) == text
    assert read(tmp_path / "a.png", small_png(behind=own)) == text


def test_latin_1_is_what_the_specification_has(tmp_path: Path) -> None:
    own = chunk(b"tEXt", b"parameters\0" + LATIN.encode("latin-1"))
    assert read(tmp_path / "a.png", small_png(behind=own)) == LATIN


def test_pictures_too_large_to_be_drawn_from_still_say_how_they_were_made(tmp_path: Path) -> None:
    assert read(tmp_path / "a.png", png(30_000, 30_000, before=CHUNKS["tEXt"](TEXT))) == TEXT


COMMENTS = {
    "as AUTOMATIC1111": lambda text: b"UNICODE\0" + text.encode("utf-16-be"),
    "little-endian": lambda text: b"UNICODE\0" + text.encode("utf-16-le"),
    "marked, big-endian": lambda text: b"UNICODE\0\xfe\xff" + text.encode("utf-16-be"),
    "marked, little-endian": lambda text: b"UNICODE\0\xff\xfe" + text.encode("utf-16-le"),
    "UTF-8 under another name": lambda text: b"UNICODE\0" + text.encode(),
    "UTF-8": lambda text: b"\0" * 8 + text.encode(),
    "UTF-8, marked": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "bare": lambda text: text.encode(),
    "ASCII": lambda text: b"ASCII\0\0\0" + text.encode(),
    "ended by nulls": lambda text: b"ASCII\0\0\0" + text.encode() + b"\0\0",
}


@pytest.mark.parametrize("text", [AUTOMATIC1111, ACCENTED])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("comment", COMMENTS)
def test_comments_of_exif_in_every_encoding(tmp_path: Path, comment: str, kind: str, text: str) -> None:
    exif = Image.Exif()
    exif[0x0131] = "program"  # without a tag beside it, Pillow leaves some formats' comments out
    exif.get_ifd(0x8769)[0x9286] = COMMENTS[comment](text)
    assert read(tmp_path / "a", encoded(kind, exif=exif.tobytes())) == text


def test_the_comment_of_a_gif(tmp_path: Path) -> None:
    assert read(tmp_path / "a.gif", encoded("GIF", comment=ACCENTED.encode())) == ACCENTED
    assert read(tmp_path / "a.jpg", encoded("JPEG", comment=ACCENTED.encode())) == ACCENTED


@pytest.mark.parametrize(
    ("text", "nodes"),
    [(json.dumps(GRAPH), ("KSampler", "SaveImage")), (json.dumps(WORKFLOW), ("KSampler", "VAEDecode"))],
)
def test_graphs_of_comfyui_are_named(tmp_path: Path, text: str, nodes: tuple[str, ...]) -> None:
    info, exif, comment = PngImagePlugin.PngInfo(), Image.Exif(), Image.Exif()
    info.add_text("prompt", text)
    exif[0x0110] = f"prompt:{text}"
    comment.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    for number, data in enumerate(
        (encoded("PNG", pnginfo=info), encoded("WEBP", exif=exif), encoded("JPEG", exif=comment))
    ):
        path = tmp_path / str(number)
        path.write_bytes(data)
        found = read_settings(path)
        assert isinstance(found, Graph)
        assert (found.nodes, json.loads(found.text)) == (nodes, json.loads(text))
        with pytest.raises(InputError, match="carries a graph of ComfyUI and no settings"):
            read_parameters(path)


def test_settings_go_before_a_graph(tmp_path: Path) -> None:
    graph = chunk(b"tEXt", b"prompt\0" + json.dumps(GRAPH).encode())
    assert read(tmp_path / "a.png", small_png(before=graph, behind=CHUNKS["tEXt"](TEXT))) == TEXT


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a cat",
        b"\0\1\2\3" * 20,
        TEXT.encode("utf-16-be")[1:9],
        b'{"a": 1}',
        b"[" * 100_000,
        b"{}",
        b'{"nodes": 3}',
    ],
)
def test_what_is_none_is_never_printed(tmp_path: Path, content: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + content[:1000]
    for number, data in enumerate(
        (
            small_png(before=chunk(b"tEXt", b"parameters\0" + content)),
            small_png(behind=chunk(b"iTXt", b"parameters" + content)),
            encoded("JPEG", exif=exif),
            encoded("GIF", comment=content),
            encoded("BMP"),
        )
    ):
        with pytest.raises(InputError, match="carries no settings; pictures made by Calotype or AUTOMATIC1111 do"):
            read(tmp_path / str(number), data)


def test_a_packet_of_xmp_is_no_prompt(tmp_path: Path) -> None:
    packet = b"XML:com.adobe.xmp\0\0\0\0\0" + f"<x:xmpmeta><rdf:li>{TEXT}</rdf:li></x:xmpmeta>".encode()
    with pytest.raises(InputError, match="carries no settings"):
        read(tmp_path / "a.png", small_png(before=chunk(b"iTXt", packet)))


def test_a_damaged_chunk_is_passed_over(tmp_path: Path) -> None:
    own = bytearray(CHUNKS["tEXt"](TEXT))
    own[30] ^= 1
    with pytest.raises(InputError, match="carries no settings"):
        read(tmp_path / "a.png", small_png(behind=bytes(own)))


def test_a_text_chunk_that_unpacks_to_20_megabytes(tmp_path: Path) -> None:
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 20_000_000))
    with pytest.raises(InputError, match="its texts have more than 16777216 bytes"):
        read(tmp_path / "bomb.png", small_png(behind=bomb))


def test_what_is_no_picture(tmp_path: Path) -> None:
    for name, data in (("text.png", b"not a picture"), ("a.gif", b"GIF89a"), ("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n")):
        with pytest.raises(InputError, match="is not a picture that can be read"):
            read(tmp_path / name, data)
