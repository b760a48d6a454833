"""Convolutions with fewer products compute what convolutions compute."""

from __future__ import annotations

import pytest

from benchmarks.micro import convolutions


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_products_give_the_same_pixels(rows: int) -> None:
    forms = convolutions.row("small", rows, 5, 7, 8).timed(1).forms
    assert set(forms) == {"direct", "2 x 2", "4 x 4"}
    assert all(own["off"] <= 1e-5 for own in forms.values())
