"""Shapes with symbols: those that are multiplied, and those that are divided and rounded up."""

from __future__ import annotations

import pytest

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import InputError

HALVED = TensorSpec(name="residual", dtype="float32", shape=("rows", 4, "height/2", "width/4"))


def test_a_divided_size_is_rounded_up() -> None:
    assert HALVED.resolve({"rows": 2, "height": 9, "width": 13}) == (2, 4, 5, 4)
    assert HALVED.resolve({"rows": 1, "height": 8, "width": 4}) == (1, 4, 4, 1)
    assert HALVED.symbols == {"rows", "height", "width"}
    assert HALVED.sizes((2, 4, 5, 4)) == {"rows": 2}


def test_a_divided_size_is_told_by_another_tensor() -> None:
    sizes = {"height": 9, "width": 13}
    HALVED.match_row((4, 5, 4), sizes)
    assert sizes == {"height": 9, "width": 13}
    for shape in ((4, 4, 4), (4, 5, 3)):
        with pytest.raises(InputError, match="a row of residual has the shape"):
            HALVED.match_row(shape, dict(sizes))
