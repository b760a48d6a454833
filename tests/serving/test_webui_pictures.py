"""What is drawn over, as AUTOMATIC1111's web interface prepares it."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.limits import Limits
from calotype.serving.webui.pictures import CROP, FILL, decoded, encoded, opened, prepared

LIMITS = Limits(upload_pixels=1000)


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def halves(size: tuple[int, int] = (64, 32)) -> Image.Image:
    """Red on the left and blue on the right."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image


def marked(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return mask


def test_a_picture_comes_with_or_without_a_head() -> None:
    text = png(halves((4, 4)))
    assert decoded(text, "image") == decoded(f"data:image/png;base64,{text}", "image")
    assert opened(text, "image", LIMITS).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("text", ["http://localhost/a.png", "https://example.com/a.png", "file:///etc/passwd"])
def test_no_address_is_followed(text: str) -> None:
    with pytest.raises(RequestRefusedError, match="image is an address, and none is followed"):
        decoded(text, "image")


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(RequestRefusedError, match="mask is no base64"):
        opened("/etc/passwd.", "mask", LIMITS)
    with pytest.raises(RequestRefusedError, match="mask is not a picture"):
        opened(base64.b64encode(b"no picture").decode(), "mask", LIMITS)
    with pytest.raises(RequestRefusedError, match="1000"):
        opened(png(Image.new("L", (32, 32))), "mask", LIMITS)


def test_just_resize_stretches_and_crop_covers() -> None:
    stretched = prepared(halves((64, 32)), None, (32, 32)).image
    assert stretched.size == (32, 32)
    assert stretched.getpixel((2, 16)) == (255, 0, 0)
    assert prepared(halves((64, 32)), None, (16, 32)).image.getpixel((1, 1)) == (255, 0, 0)
    ends = halves((64, 32))
    ends.paste((0, 255, 0), (0, 0, 15, 32))
    assert prepared(ends, None, (32, 32), resize_mode=CROP).image.getpixel((2, 16)) == (255, 0, 0)  # green is cut off


def test_a_mask_can_be_turned_round() -> None:
    mask = marked((64, 32), (0, 0, 32, 32))
    plain = prepared(halves(), mask, (64, 32)).mask
    turned = prepared(halves(), mask, (64, 32), invert=True).mask
    assert plain is not None and turned is not None
    assert not np.any(np.asarray(plain) == np.asarray(turned))


def test_a_mask_that_draws_nothing_is_refused() -> None:
    with pytest.raises(RequestRefusedError, match="the mask draws nothing"):
        prepared(halves(), marked((64, 32)), (64, 32))


def test_a_hole_is_filled_with_the_colours_around_it() -> None:
    image = Image.new("RGB", (64, 64), (200, 40, 40))
    image.paste((0, 255, 0), (20, 20, 44, 44))
    over = prepared(image, marked((64, 64), (20, 20, 44, 44)), (64, 64), fill=FILL)
    pixels = np.asarray(over.image).astype(int)
    assert np.abs(pixels - (200, 40, 40)).max() <= 8  # of 255: blurred with its transparency in eight bits
    assert np.array_equal(pixels[:20], np.asarray(image)[:20])


def test_only_the_masked_part_is_drawn_in_full_size_and_put_back() -> None:
    image = halves((128, 128))
    mask = marked((128, 128), (80, 20, 90, 40))
    over = prepared(image, mask, (64, 64), padding=6)
    assert over.box is not None
    left, top, right, bottom = over.box
    assert (right - left, bottom - top) == (32, 32)  # as the size that is drawn
    assert left <= 80 - 6 and top == 14 and right >= 96 and bottom == 46
    assert over.image.size == (64, 64)
    whole = over.finished(np.full((64, 64, 3), 255, np.uint8))
    inside = np.asarray(mask) > 0
    assert whole.shape == (128, 128, 3)
    assert (whole[inside] == 255).all()
    assert np.array_equal(whole[~inside], np.asarray(image)[~inside])


def test_a_soft_edge_fades_inside_the_mask_alone() -> None:
    image = Image.new("RGB", (64, 64))
    mask = marked((64, 64), (16, 16, 48, 48))
    over = prepared(image, mask, (64, 64), padding=0, feather=8)
    whole = over.finished(np.full((64, 64, 3), 255, np.uint8))
    assert 0 < whole[16, 32, 0] < 255
    assert whole[32, 32, 0] == 255
    assert not whole[np.asarray(mask) == 0].any()


def test_a_part_at_the_edge_stays_in_the_picture() -> None:
    over = prepared(halves((64, 32)), marked((64, 32), (60, 0, 64, 4)), (64, 32), padding=32)
    assert over.box is not None
    assert over.box[0] >= 0 and over.box[2] <= 64 and over.box[3] <= 32


def test_pictures_are_png_with_their_settings() -> None:
    for text in ("a cat\nSteps: 3", "ein Kätzchen ☂\nSteps: 3"):
        with Image.open(io.BytesIO(base64.b64decode(encoded(np.zeros((2, 3, 3), np.uint8), text)))) as image:
            assert (image.format, image.size, image.info["parameters"]) == ("PNG", (3, 2), text)
            assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
