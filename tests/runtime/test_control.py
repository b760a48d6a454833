"""What a request says of a ControlNet: checked, as JSON, as the command line spells it; and its picture, fitted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.control import Control
from calotype.runtime.errors import InputError, MissingPackageError
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.control_pictures import control_pixels
from calotype.runtime.request import Request


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def test_a_request_is_json_both_ways_and_a_stranger_s_path_is_not_followed(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "edges.png")
    one = Control(model="one", image=picture(1), scale=0.5, start=0.1, end=0.9, guess=True, resize="pad")
    two = Control(model=tmp_path / "control", image=tmp_path / "edges.png", preprocess="threshold")
    value = Request(prompt="a", controls=(one, two)).to_json()
    found = Request.from_json(value, files=True)
    assert found.to_json() == value
    assert (found.controls[1], found.controls[0].scale, found.controls[0].guess) == (two, 0.5, True)
    for control, what in (
        (value["controls"][1], "a control's model"),
        ({"model": "x", "image": {"file": "/"}}, "image"),
    ):
        with pytest.raises(InputError, match=f"{what} names a file, and files of a request are not opened here"):
            Request.from_json({"prompt": "a", "controls": [control]})
    for control in ({"image": None}, {"model": "x", "strength": 1}):
        with pytest.raises(
            InputError, match="a control needs a model, and may have end, guess, image, mode, preprocess"
        ):
            Request.from_json({"prompt": "a", "controls": [control]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": float("nan")}, "a control's scale=nan is not a finite number"),
        ({"start": 0.6, "end": 0.5}, "a control from 0.6 to 0.5 is no share of the steps; use 0 <= start < end <= 1"),
        ({"guess": "yes"}, "a control's guess='yes' is not known; use True or False"),
        ({"resize": "tile"}, "a control's resize='tile' is not known; valid: crop, stretch, pad"),
        (
            {"preprocess": "hed"},
            "a control's preprocess='hed' is not known; valid: canny, grayscale, threshold",
        ),
        ({"model": 3}, "a control's model=3 is no name and no path; give one of them"),
        ({"image": 3}, "a control's image is of type int, not a picture"),
    ],
)
def test_values_out_of_range_get_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        Control(**{"model": "one", **values})
    assert "\n" not in str(caught.value)


def test_the_command_line_s_spelling() -> None:
    assert Control.parse("canny=my-control:edges.png:0.8:0:0.6") == (
        "canny", Path("my-control"), Control(model="canny", image="edges.png", scale=0.8, end=0.6),
    )  # fmt: skip
    assert Control.parse("x=a/b:inpaint@") == ("x", Path("a/b"), Control(model="x", preprocess="inpaint"))
    words = Control.parse("x=a:canny-50-150,pad@b.jpg")[2]
    assert (words.preprocess, words.resize, words.image) == ("canny-50-150", "pad", Path("b.jpg"))
    assert Control.parse("x=a:stretch@b.jpg")[2] == Control(model="x", image="b.jpg", resize="stretch")
    for text in ("x=a:hed@b", "x=a:canny,threshold@b", "x=a:pad,crop@b", "x=a:@b"):
        with pytest.raises(InputError, match="before a control's picture cannot be read; valid is one of each"):
            Control.parse(text)
    for text in ("x=a:canny-50@b", "x=a:threshold-256@b", "x=a:grayscale-3@b", "x=a:canny-a-b@b"):
        with pytest.raises(InputError, match=r"has other levels than .* has, each 0 to 255"):
            Control.parse(text)
    for text in ("a:b", "x=a", "x=:b", "x=a:b:1:2", "=a:b"):
        with pytest.raises(InputError, match=r"cannot be read; valid: NAME=BUNDLE:PICTURE\[:SCALE\[:START:END\]\]"):
            Control.parse(text)
    with pytest.raises(InputError, match="has no number where one is due"):
        Control.parse("x=a:b:much")


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_pictures_of_other_sizes_are_fitted(resize: str) -> None:
    canvas = Canvas(height=32, width=48)
    bands = Image.new("RGB", (96, 32), "red")
    bands.paste("lime", (24, 0, 72, 32))
    pixels = control_pixels(bands, canvas, preprocess=None, resize=resize)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 48), np.float32)
    lime, black = (pixels[1] > 0.9).mean(), (pixels.max(0) < 0.1).mean()
    assert (round(float(lime), 1), round(float(black), 1)) == {"crop": (1, 0), "stretch": (0.5, 0), "pad": (0.2, 0.5)}[
        resize
    ]


def test_preprocessors_that_need_no_model() -> None:
    canvas = Canvas(height=32, width=48)
    grey = control_pixels(picture(1), canvas, preprocess="grayscale", resize="crop")
    assert np.array_equal(grey[0] * 255, np.asarray(picture(1).convert("L"), np.float32))
    assert np.array_equal(grey[0], grey[1]) and np.array_equal(grey[0], grey[2])
    black = control_pixels(picture(1), canvas, preprocess="threshold", resize="crop")
    assert np.array_equal(black[0], grey[0] * 255 >= 128)
    dark = control_pixels(picture(1), canvas, preprocess="threshold-200", resize="crop")
    assert np.array_equal(dark[0], grey[0] * 255 >= 200)
    one = control_pixels(picture(1), canvas, preprocess=None, resize="crop", channels=1)
    assert np.array_equal(one, grey[:1])


def test_canny_s_edges_are_opencv_s(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    canvas = Canvas(height=32, width=48)
    smooth = Image.new("RGB", (48, 32), "grey")
    smooth.paste("white", (10, 8, 30, 20))
    smooth.paste((140, 140, 140), (36, 4, 44, 28))
    for preprocess, levels in (("canny", (100, 200)), ("canny-20-60", (20, 60))):
        edges = control_pixels(smooth, canvas, preprocess=preprocess, resize="crop")
        assert np.array_equal(edges[0] * 255, cv2.Canny(np.asarray(smooth), *levels))
        assert edges[0, 5:15, 8:12].any() and edges[0, 10:20, 34:38].any() == (preprocess != "canny")
    padded = control_pixels(Image.new("RGB", (96, 16), "white"), canvas, preprocess="canny", resize="pad")
    assert not padded.any()  # where the picture ends is no edge of it
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        MissingPackageError, match=r"opencv-python-headless is not installed; install it with:.*control"
    ):
        control_pixels(smooth, canvas, preprocess="canny", resize="crop")
