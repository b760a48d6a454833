"""Colours are told as people tell them, and a picture in another one keeps its drawing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.captions import Concept
from training.colours import others, takes_colour
from training.palette import NAMED, NEUTRAL, TARGETS, from_oklab, main_colour, recolour, to_oklab


def disc(colour: str | int, eye: str = "black") -> np.ndarray:
    """A disc with an eye, on white."""
    picture = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(picture)
    fill = colour if isinstance(colour, str) else f"#{colour:06x}"
    draw.ellipse((8, 8, 56, 56), fill=fill)
    draw.ellipse((28, 28, 36, 36), fill=eye)
    return np.asarray(picture)


def test_oklab_is_the_published_one() -> None:
    # Of the page that defines it: white, and the primaries to three digits.
    published = {(255, 255, 255): (1, 0, 0), (255, 0, 0): (0.628, 0.225, 0.126), (0, 0, 255): (0.452, -0.032, -0.312)}
    for pixel, expected in published.items():
        np.testing.assert_allclose(to_oklab(np.array(pixel, np.uint8)), expected, atol=1e-3)
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(from_oklab(to_oklab(pixels)), pixels)


# The coloured circles of three sets of emoji.
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("red", ("#f44336", "#dd2e44", "#f8312f")),
        ("orange", ("#ff9800", "#f4900c", "#ff6723")),
        ("yellow", ("#ffcc32", "#fdcb58", "#fcd53f")),
        ("green", ("#7cb342", "#78b159", "#00d26a")),
        ("blue", ("#1976d2", "#55acee", "#0074ba")),
        ("purple", ("#ab47bc", "#aa8ed6", "#8d65c5")),
        ("brown", ("#b76d54", "#c1694f", "#6d4534")),
        ("black", ("#424242", "#31373d", "#000000")),
        ("pink", ("#ff94bd", "#f4abba", "#ff6aa0")),
        ("gray", ("#939393", "#99aab5", "#9b9b9b")),
    ],
)
def test_colours_have_the_names_that_three_sets_give_them(name: str, values: tuple[str, ...]) -> None:
    assert [main_colour(disc(value)) for value in values] == [name] * 3


def test_a_picture_of_many_colours_or_of_none_has_no_main_one() -> None:
    stripes = np.concatenate([disc(name) for name in ("red", "#fdcb58", "#78b159", "#55acee")], axis=1)
    assert main_colour(stripes) is None
    assert main_colour(np.full((8, 8, 3), 255, np.uint8)) is None


@pytest.mark.parametrize("own", TARGETS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_recoloured_picture_has_the_colour_and_keeps_black_white_and_other_hues(own: str, target: str) -> None:
    picture = disc(NAMED[own])
    changed = recolour(picture, target)
    assert main_colour(changed) == target
    np.testing.assert_array_equal(changed[0, 0], (255, 255, 255))
    np.testing.assert_allclose(changed[32, 32], (0, 0, 0), atol=3)
    far = disc("#fdcb58", eye="#1976d2")
    assert abs(recolour(far, target)[32, 32].astype(int) - far[32, 32]).max() <= 2


def test_what_has_no_hue_is_not_recoloured() -> None:
    for colour in NEUTRAL:
        assert others(colour) == ()
        with pytest.raises(ValueError, match="no hue"):
            recolour(disc(NAMED[colour]), "blue")
    assert set(others("red")) == {*TARGETS} - {"red"}


def test_people_and_what_has_a_colour_in_its_name_take_none() -> None:
    def takes(name: str, group: int) -> bool:
        return takes_colour(Concept(slug=name, name=name, keywords=(), group=group))

    assert takes("frog", 3) and takes("predator", 3)  # a word, not a part of one
    assert not takes("green apple", 4) and not takes("grey heart", 0)
    assert not takes("cook", 1)
