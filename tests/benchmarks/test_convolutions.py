"""Convolutions with fewer products compute what convolutions compute."""

from __future__ import annotations

import pytest

from benchmarks import convolutions


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_products_give_the_same_pixels(rows: int) -> None:
    found = convolutions.measure(rows, 5, 7, 8, 1)
    assert set(found) == {"direct", "2 x 2", "4 x 4"}
    assert all(own["off"] <= 1e-5 for own in found.values())
