"""Retrieval and its change with a mode, on answers that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.colours import ColourJudge
from benchmarks.quality.distance import change
from benchmarks.quality.prompts import PHRASINGS, by_keyword, in_colour, in_words
from benchmarks.quality.retrieval import Gallery, nearest_style, retrieved
from training.captions import Concept
from training.config import STYLES
from training.data import Dataset
from training.palette import recolour

FROG = Concept(slug="frog", name="frog", keywords=("toad",), group=3)
COOK = Concept(slug="cook", name="cook", keywords=(), group=1)
PAIRS = [
    {"slug": each.slug, "name": each.name, "style": style, "split": "seen"} for each in (FROG, COOK) for style in STYLES
]
SLUGS = ("red-apple", "pear", "fig")


def test_a_picture_is_sought_among_those_of_its_style() -> None:
    features = np.arange(9.0)[:, None]
    gallery = Gallery(
        pictures=[], features=features, moved=features, slugs=[*SLUGS] * 3, styles=np.repeat(np.arange(3), 3)
    )
    pairs = [{"slug": "pear", "style": style} for style in STYLES]
    # Nearest to its own, to another of its style, and to one of another style: there the next of its own is second.
    queries = np.array([[1.1], [5.2], [0.0]])
    np.testing.assert_array_equal(retrieved(queries, gallery, pairs, 1), [True, False, False])
    np.testing.assert_array_equal(retrieved(queries, gallery, pairs, 2), [True, True, True])
    np.testing.assert_array_equal(retrieved(queries[:0], gallery, [], 1), [])


def test_the_nearest_style_is_sought_among_the_pictures_of_the_pairs_own_concept() -> None:
    features = np.arange(9.0)[:, None]
    gallery = Gallery(
        pictures=[], features=features, moved=features, slugs=[*SLUGS] * 3, styles=np.repeat(np.arange(3), 3)
    )
    pairs = [{"slug": "pear"}, {"slug": "pear"}, {"slug": "fig"}]  # at 1, 4 and 7; at 2, 5 and 8
    np.testing.assert_array_equal(nearest_style(np.array([[2.1], [6.0], [3.0]]), gallery, pairs), [0, 2, 0])


def test_a_change_is_in_points_and_its_error_that_of_pairs_not_of_pictures() -> None:
    pairs = [{"split": split} for split in ("seen", "held_out", "seen", "held_out")]
    exact = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
    own = np.array([1, 0, 1, 0, 1, 0, 0, 0], bool)
    found = change(exact, own, pairs)
    # Two seeds each: the seen pairs change by 0 and -50, the held-out ones by -100 and 0.
    assert found["seen"] == {"mean": -25.0, "error": 25.0}
    assert found["held_out"] == {"mean": -50.0, "error": 50.0}
    assert change(exact, exact, pairs)["seen"]["error"] == pytest.approx(0)


def green() -> Dataset:
    """A frog and a cook in three styles, all green."""
    pictures = np.full((6, 8, 8, 3), (0x78, 0xB1, 0x59), np.uint8)
    return Dataset(pictures=pictures, concepts=(FROG,) * 3 + (COOK,) * 3, styles=(*STYLES, *STYLES))


def test_pairs_are_asked_for_by_keyword_and_in_words_beside_their_name() -> None:
    ask = by_keyword(green(), PAIRS)
    assert ask.pairs == PAIRS[:3]
    assert ask.prompts["by name"][0] == "frog, noto style" and ask.prompts["by keyword"][0] == "toad, noto style"
    words = in_words(green(), PAIRS)
    assert words.prompts[PHRASINGS[0]][3] == "a drawing of a cook, noto style"
    assert list(words.prompts) == [*PHRASINGS]


def test_pairs_are_asked_for_in_their_own_colour_and_in_turn_in_another() -> None:
    ask = in_colour(green(), PAIRS)
    assert ask.pairs == PAIRS[:3]  # people take no colour
    assert ask.prompts["in its own colour"] == [f"green frog, {style} style" for style in STYLES]
    assert ask.prompts["in another colour"] == [
        f"{colour} frog, {style} style" for colour, style in zip(("red", "orange", "yellow"), STYLES, strict=True)
    ]
    assert ask.colours["by name"] == ask.colours["in another colour"] == ["red", "orange", "yellow"]


def test_a_picture_is_sought_among_real_ones_in_its_colour() -> None:
    dataset = green()
    dataset.pictures[:3, :4] = 255  # the frog is lower than what else there is
    log = Concept(slug="log", name="log", keywords=(), group=3)
    dataset = Dataset(pictures=dataset.pictures, concepts=(FROG,) * 3 + (log,) * 3, styles=dataset.styles)
    judge = ColourJudge(dataset)
    pair = [{"slug": "frog", "style": "noto", "split": split} for split in ("seen", "held_out")]
    assert judge.shelf("noto", "blue")[0] == ["frog", "log"]
    blue = Image.fromarray(recolour(dataset.pictures[0], "blue"))
    report = judge([blue, Image.fromarray(dataset.pictures[0])], pair, ["blue", "blue"])
    assert (report["seen_colour"], report["held_out_colour"]) == (100.0, 0.0)
    assert report["seen_in_colour_top5"] == 100.0
    assert judge.ceiling(pair, ["blue", "red"]) == 100.0
