"""What pictures and masks of every kind mean, against what diffusers makes of them and what people see."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.masks import fit_mask
from calotype.runtime.pictures.reading import (
    load_image,
    open_mask,
    open_picture,
    to_brightness,
    to_rgb,
    to_transparency,
)
from tests.runtime.pictures.samples import GREY, RGB, chunk, png

WHITE, BLACK = 255, 0


def grey_png(depth: int, key: int) -> bytes:
    """One row of four greys of ``depth`` bits, of which ``key`` is transparent."""
    levels = [0, 1, 2, 3] if depth < 16 else [300, 301, 0x8000, 0xFFFF]
    if depth == 16:
        row = struct.pack(">4H", *levels)
    else:
        packed = sum(level << (depth * (3 - place)) for place, level in enumerate(levels))
        row = packed.to_bytes(max(1, 4 * depth // 8))
    return png(4, 1, depth=depth, colours=GREY, data=b"\0" + row, before=chunk(b"tRNS", struct.pack(">H", key)))


@pytest.mark.parametrize(
    ("depth", "key", "expected"),
    [
        (2, 2, [0, 85, 255, 255]),
        (4, 2, [0, 17, 255, 51]),
        (8, 2, [0, 1, 255, 3]),
        (16, 300, [255, 1, 128, 255]),
        (16, 0x8000, [1, 1, 255, 255]),
    ],
)
def test_the_grey_that_is_transparent_is_white(tmp_path: Path, depth: int, key: int, expected: list[int]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(grey_png(depth, key))
    assert np.asarray(load_image(path))[0, :, 0].tolist() == expected
    assert np.asarray(open_picture(Image.open(io.BytesIO(path.read_bytes()))))[0, :, 0].tolist() == expected


def test_the_colour_of_16_bits_that_is_transparent_is_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    key = chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x2345, 0x3456))
    row = struct.pack(">6H", 0x1234, 0x2345, 0x3456, 0x8000, 0x2345, 0x3456)
    path.write_bytes(png(2, 1, depth=16, colours=RGB, data=b"\0" + row, before=key))
    assert np.asarray(load_image(path))[0].tolist() == [[255, 255, 255], [128, 35, 52]]


def strokes(ground: int, stroke: int, alpha: int = 0) -> Image.Image:
    """LA: what is painted is opaque, and the left half of it; around it is ``alpha``."""
    picture = Image.new("LA", (8, 4), (ground, alpha))
    picture.paste((stroke, 255), (0, 0, 4, 4))
    return picture


def as_palette(picture: Image.Image) -> Image.Image:
    """With entries of one colour that differ in transparency alone, as programs write them."""
    colours, numbers = np.unique(np.asarray(picture).reshape(-1, 2), axis=0, return_inverse=True)
    found = Image.frombytes("P", picture.size, numbers.astype(np.uint8).tobytes())
    found.putpalette([int(level) for level in colours[:, 0].repeat(3)])
    found.info["transparency"] = colours[:, 1].tobytes()
    return found


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
@pytest.mark.parametrize(
    ("picture", "left", "right"),
    [
        (strokes(BLACK, WHITE), True, False),  # what AUTOMATIC1111 and diffusers agree about
        (strokes(WHITE, BLACK, 255), False, True),
        (strokes(WHITE, WHITE), True, False),  # colours say nothing: what is opaque, as AUTOMATIC1111 has it
        (strokes(BLACK, BLACK), True, False),
        (strokes(WHITE, WHITE, 100), True, False),
    ],
)
def test_transparency_in_a_mask(mode: str, picture: Image.Image, left: bool, right: bool) -> None:
    mask = as_palette(picture) if mode == "P" else picture.convert(mode)
    where = fit_mask(to_brightness(mask), mask.size, 8, 4)
    assert (where[:, :4].all(), where[:, 4:].any()) == (left, right)


def masks() -> dict[str, Image.Image]:
    """One mask in every mode; what is opaque in it is all of it."""
    levels = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    grey = Image.fromarray(levels)
    colours = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    hole = colours.quantize(16)
    hole.info["transparency"] = 3
    key = grey.copy()
    key.info["transparency"] = int(levels[0, 0])
    return {
        "1": grey.convert("1"),
        "L": grey,
        "L with a transparent grey": key,
        "LA": Image.merge("LA", (grey, grey.rotate(180))),
        "P": colours.quantize(16),
        "P with a hole": hole,
        "RGB": colours,
        "RGBA": Image.merge("RGBA", (*colours.split(), grey)),
        "CMYK": colours.convert("CMYK"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", masks())
def test_masks_of_every_mode_mean_what_diffusers_makes_of_them(mode: str) -> None:
    from diffusers.image_processor import VaeImageProcessor

    mask = masks()[mode]
    processor = VaeImageProcessor(
        vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True, do_resize=False
    )
    expected = processor.preprocess(mask)[0, 0].numpy() > 0
    assert (fit_mask(open_mask(mask), mask.size, 8, 6) == expected).all()


def test_masks_of_16_bits_are_drawn_where_they_are_at_least_half_white(tmp_path: Path) -> None:
    levels = np.array([[0, 300, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    for mask in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert fit_mask(open_mask(mask), (5, 1), 5, 1).tolist() == [[False, False, False, True, True]]
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert fit_mask(open_mask(tmp_path / "a.png"), (5, 1), 5, 1).tolist() == [[False, False, False, True, True]]


def test_a_mask_stands_upright_as_its_picture_does() -> None:
    mask = Image.new("L", (4, 2))
    mask.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    mask.save(file, "PNG", exif=exif)
    upright = open_mask(Image.open(file))
    assert (upright.size, upright.getpixel((1, 0))) == ((2, 4), 255)


def test_transparency_is_told_apart_from_none() -> None:
    """Upright, whatever the mode; a picture that has no alpha says nothing of it."""
    image = Image.new("RGBA", (4, 2), (9, 9, 9, 255))
    image.putpixel((0, 0), (9, 9, 9, 0))
    image.putpixel((1, 0), (9, 9, 9, 100))
    turned = image.copy()
    turned.getexif()[0x0112] = 3  # upside down
    for own, places in ((image, ((0, 0), (1, 0))), (image.convert("LA"), ((0, 0), (1, 0))), (turned, ((3, 1), (2, 1)))):
        found = to_transparency(own)
        assert found is not None and found.mode == "L"
        assert [found.getpixel(place) for place in places] == [255, 155]
        assert np.asarray(found).sum() == 255 + 155
    for mode in ("RGB", "L", "1", "CMYK"):
        assert to_transparency(Image.new(mode, (4, 2))) is None


def test_a_picture_that_cannot_be_decoded_is_an_input_error() -> None:
    for read in (open_picture, open_mask):
        with pytest.raises(InputError, match=r"the (picture|mask) is not a picture that can be read"):
            read(Image.open(io.BytesIO(png(8, 8))))


def lab(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> np.ndarray:
    """What people see, in CIE L*a*b* of eight bits."""
    space = ImageCms.createProfile("LAB")
    seen = ImageCms.profileToProfile(
        image, profile, space, outputMode="LAB", renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    assert seen is not None
    return np.asarray(seen, np.int16)


def wide() -> ImageCms.ImageCmsProfile:
    """A profile of other primaries: sRGB's own, with red and green exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return ImageCms.ImageCmsProfile(io.BytesIO(bytes(data)))


def test_colour_profiles_are_honoured() -> None:
    """Outside a mask the picture comes back as people see it."""
    profile, srgb = wide(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.info["icc_profile"] = profile.tobytes()
    got = to_rgb(picture)
    assert np.abs(np.asarray(got, np.int16) - np.asarray(picture, np.int16)).max() > 50
    assert np.abs(lab(got, srgb) - lab(picture, profile)).max() <= 3
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    clear.info["icc_profile"] = profile.tobytes()
    assert to_rgb(clear).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_profile_of_srgb_changes_nothing(mode: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)
    expected = picture.convert("RGB").tobytes()
    picture.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert to_rgb(picture).tobytes() == expected


@pytest.mark.parametrize("profile", [b"", b"x" * 200, b"\0" * 4096])
def test_a_profile_that_cannot_be_used_is_left_out(profile: bytes, caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    picture.info["icc_profile"] = profile
    with caplog.at_level(logging.WARNING):
        assert to_rgb(picture).getpixel((0, 0)) == (1, 2, 3)
    assert [record.getMessage()[:48] for record in caplog.records] == (
        ["a picture's colour profile cannot be used (canno"] if profile else []
    )
