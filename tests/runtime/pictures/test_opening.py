"""Files that are not what they say, and pictures of few bytes that would take a machine's time or memory."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from calotype.runtime.errors import InputError
from calotype.runtime.pictures import opening
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pictures.reading import load_image
from tests.runtime.pictures.samples import encoded, png, tiff

KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "AVIF": ".avif", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif"}
BASE = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_formats_that_are_read_by_their_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.dat"
    path.write_bytes(encoded(kind))
    assert load_image(path).getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=4)


def test_postscript_called_a_picture_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for read in (load_image, read_parameters):
        with pytest.raises(InputError, match=r"x\.png is not a picture that can be read; PNG, JPEG, WebP, AVIF, TIFF"):
            read(path)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI"])
def test_other_formats_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded(kind))
    with pytest.raises(InputError, match="is not a picture that can be read"):
        load_image(path)


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(InputError, match=r"bomb\.png has more than 67108864 pixels; scale it down first"):
        load_image(path)


def progressive(scans: int) -> bytes:
    """A JPEG file whose last scan comes again and again; each takes 36 bytes."""
    whole = encoded("JPEG", (4000, 4000), progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def repeated_exif(count: int) -> bytes:
    """A JPEG file with as many EXIF segments, each as long as it can be."""
    whole = encoded("JPEG", (64, 64))
    return whole[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * count + whole[2:]


def run_length(width: int) -> bytes:
    """A BMP file of one row that a single command fills."""
    offset = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset, 0, 0, offset) + header + b"\0" * 1024 + b"\1\0\0\0\0\1"


def tiles(width: int, length: int) -> bytes:
    """A TIFF file of 16 x 16 pixels in one tile that is larger."""
    data = zlib.compress(b"\0" * 1000)
    entries = [*BASE, (322, 4, 1, width), (323, 4, 1, length), (324, 4, 1, 8), (325, 4, 1, len(data))]
    return tiff(entries, data)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jpg", progressive(300), "has more scans than a picture of 4000x4000 needs; save it as PNG"),
        ("a.jpg", repeated_exif(1000), "has more EXIF data than a photograph needs; save it as PNG"),
        ("a.bmp", run_length(20_000_000), "has more run-length encoded pixels than a picture of 20000000x1 needs"),
        ("a.tif", tiles(60_000, 60_000), "has more pixels in tiles than a picture of 16x16 needs"),
    ],
)
def test_few_bytes_that_would_keep_a_decoder_busy(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    begin = time.thread_time()
    with pytest.raises(InputError, match=message):
        load_image(path)
    assert time.thread_time() - begin < 2  # decoding takes twenty, and more


def test_progressive_pictures_of_people_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG", (64, 64), progressive=True))
    assert load_image(path).size == (64, 64)
    path.write_bytes(
        tiff([*BASE[:3], (259, 3, 1, 1), BASE[4], (273, 4, 1, 8), (278, 4, 1, 16), (279, 4, 1, 256)], b"\7" * 256)
    )
    assert load_image(path).getpixel((3, 3)) == (7, 7, 7)
    Image.new("L", (64, 64), 7).save(path, "TIFF", compression="tiff_adobe_deflate", big_tiff=True)
    assert load_image(path).getpixel((3, 3)) == (7, 7, 7)


@pytest.mark.parametrize("data", [b"GIF89a\x08\0\x08\0\0\0\0" + b"\x21\xf9\x04\0\0\0\0\0" * 1000], ids=["GIF"])
def test_a_file_of_very_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(opening, "MAX_READS", 100)
    path = tmp_path / "a.gif"
    path.write_bytes(data)
    with pytest.raises(InputError, match="it is made of more pieces than a picture has"):
        load_image(path)


def test_exif_of_several_segments_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(repeated_exif(3))
    assert load_image(path).size == (64, 64)
    path.write_bytes(repeated_exif(1000))
    with pytest.raises(InputError, match="has more EXIF data than a photograph needs"):
        read_parameters(path)


def test_a_directory_whose_entries_share_their_data(tmp_path: Path) -> None:
    """Libtiff would read 400 tags of one megabyte each, which is the file's only one."""
    size = 1_000_000
    path = tmp_path / "a.tif"
    path.write_bytes(tiff([*BASE, *((1000 + number, 7, size, 8) for number in range(400))], b"\0" * size))
    with pytest.raises(InputError, match="has tags that share their data; save it as PNG"):
        load_image(path)


@pytest.mark.parametrize("read", [load_image, read_parameters])
def test_what_is_no_file(tmp_path: Path, read: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(read)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    for name, message in (
        ("pipe.png", "is not a picture that can be read: It is a pipe, a device or a socket, not a file"),
        ("/dev/zero", "is not a picture that can be read: It is a pipe, a device or a socket, not a file"),
        ("folder.png", "is not a picture that can be read: Is a directory"),
        ("dangling.png", "does not exist"),
        ("no.png", "does not exist"),
        ("a\0b.png", r"'.*a\\x00b.png' is not a picture that can be read: embedded null byte"),
        ("a" * 300, "is not a picture that can be read: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)
    monkeypatch.setattr(opening, "MAX_BYTES", 100)
    (tmp_path / "large.png").write_bytes(encoded("PNG", (200, 200)))
    with pytest.raises(InputError, match=r"large\.png' is not a picture that can be read: It is larger than"):
        read(tmp_path / "large.png")


def pillow_reads(data: bytes) -> bool:
    file = io.BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file) as image:
                image.load()
        except Exception:  # the library's decoders have no common class but this
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pictures_are_input_errors_where_pillow_alone_cannot_read_them(tmp_path: Path, kind: str) -> None:
    whole, rng = encoded(kind), random.Random(0)
    path = tmp_path / "a"
    for _ in range(150):
        damaged = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
        for _ in range(min(len(damaged), 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        said = ""
        try:
            load_image(path)
        except InputError as error:
            said = str(error)
        assert "\n" not in said
        assert (said == "") == pillow_reads(damaged) or (kind == "TIFF" and "has tags that share their data" in said)
        with pytest.raises(InputError) as caught:
            read_parameters(path)  # none of them has settings
        assert "\n" not in str(caught.value)


def test_the_memory_of_a_large_picture(tmp_path: Path) -> None:
    """Nine bytes a pixel at most, beside the file: here 2048 x 2048 of them, with transparency."""
    path = tmp_path / "a.png"
    Image.new("RGBA", (2048, 2048), (200, 0, 0, 100)).save(path, compress_level=1)
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from calotype.runtime.pictures.reading import load_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "load_image(Path(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 / 2048**2 < 14
