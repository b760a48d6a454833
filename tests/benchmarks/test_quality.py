"""Retrieval and its change with a mode, on answers that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.int8 import change
from benchmarks.quality.__main__ import Gallery, nearest_style, retrieved
from training.config import STYLES

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
