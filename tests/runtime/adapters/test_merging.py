"""Merging's own arithmetic, against numpy's: products in pieces, and values rounded to what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.runtime.adapters.changes import matrix_product
from calotype.runtime.adapters.full import Full
from calotype.runtime.adapters.low_rank import LowRank
from calotype.runtime.adapters.merging import Merged
from calotype.runtime.adapters.rounding import PIECE, round_to
from calotype.runtime.errors import InputError
from calotype.runtime.graphs.layouts import turned

HALF = np.dtype(np.float16)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 4, 16), (37, 5, 700), (320, 32, 1281), (15, 200, 33), (48, 5000, 3)])
def test_products_in_pieces_are_products(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((rows, rank), np.float32), rng.standard_normal((rank, columns), np.float32)
    wanted = left.astype(np.float64) @ right
    np.testing.assert_allclose(matrix_product(left, right), wanted, atol=1e-6 * np.abs(wanted).max() * rank**0.5)


def test_rounding_to_half_precision_is_numpys_for_every_size_and_tie() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    between = (halves[:-1] + halves[1:]) / 2  # ties, in the order of the bits
    around = [np.nextafter(between, np.float32(edge)) for edge in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4 * PIECE, dtype=np.uint32).view(np.float32)
    values = np.concatenate([halves, between, *around, bits[np.abs(bits) < 32768]])
    wanted = values.astype(np.float16)
    inside = np.isfinite(wanted)
    got = values[inside].copy()
    assert len(got) > 4 * PIECE
    assert round_to(HALF, got)
    np.testing.assert_array_equal(got, wanted[inside].astype(np.float32))


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30, np.inf, -np.inf, np.nan])
def test_what_half_precision_does_not_hold_is_said(value: float) -> None:
    values = np.ones(3 * PIECE, np.float32)
    values[PIECE + 3] = value
    with np.errstate(over="ignore"):
        assert not round_to(HALF, values)
    values[PIECE + 3] = 65519.0
    assert round_to(HALF, values)
    assert values[PIECE + 3] == 65504.0


def test_single_precision_is_left_as_it_is() -> None:
    values = np.array([1e-30, 1 / 3, 3e38], np.float32)
    before = values.copy()
    assert round_to(np.dtype(np.float32), values)
    np.testing.assert_array_equal(values, before)
    values[0] = np.inf
    assert not round_to(np.dtype(np.float32), values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tensor_is_made_when_it_is_read_and_the_same_in_both_dtypes(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    own = {name: rng.standard_normal((24, 40)).astype(dtype) for name in "ab"}
    up, down = rng.standard_normal((24, 2), np.float32), rng.standard_normal((2, 40), np.float32)
    files = [Path("a.safetensors")]
    made = Merged({"a": [LowRank(down=down, up=up, mid=None, factor=0.5)]}, own, files)
    assert (list(made), len(made)) == (["a"], 1)
    assert made["a"].dtype == dtype
    assert made.single("a").dtype == np.float32
    np.testing.assert_array_equal(made["a"].astype(np.float32), made.single("a"))
    wanted = own["a"].astype(np.float64) + 0.5 * (up.astype(np.float64) @ down)
    np.testing.assert_allclose(made.single("a"), wanted, rtol=1e-3 if dtype == np.float16 else 1e-5, atol=1e-5)
    huge = Merged({"a": [LowRank(down=down, up=up, mid=None, factor=1e38)]}, own, files)
    with pytest.raises(InputError, match=r"with a\.safetensors the weight a is beyond what float(16|32) holds"):
        huge["a"]


@pytest.mark.parametrize("shape", [(130, 40), (64, 3), (1, 5), (70, 6, 3, 3)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_matrix_comes_in_pieces_as_it_comes_whole(shape: tuple[int, ...], count: int) -> None:
    rng = np.random.default_rng(0)
    own = {"a": rng.standard_normal(shape).astype(np.float16)}
    rows, *columns = shape
    changes = [
        LowRank(
            down=rng.standard_normal((2, *columns), np.float32),
            up=rng.standard_normal((rows, 2, *(1 for _ in columns[1:])), np.float32),
            mid=None,
            factor=0.5,
        )
        for _ in range(count)
    ]
    made = Merged({"a": changes}, own, [])
    whole = made._whole("a")
    np.testing.assert_array_equal(made.single("a"), whole)
    assert (made.shape("a"), made.single("a").shape) == (shape, shape)
    seen = np.empty((rows, whole.size // rows), np.float32)
    for part, piece in made.pieces("a"):
        seen[part] = piece
    np.testing.assert_array_equal(seen, whole.reshape(rows, -1))
    if len(shape) == 2:
        np.testing.assert_array_equal(turned(shape, made.pieces("a")), whole.T)
    full = Merged({"a": [*changes, Full(value=np.ones(shape, np.float32), factor=1.0)]}, own, [])
    ((part, piece),) = full.pieces("a")  # not by rows
    np.testing.assert_allclose(piece.reshape(shape), whole + 1, rtol=2e-3, atol=1e-3)
    assert part == slice(None)
    own["a"][-1] = 60000
    with pytest.raises(InputError, match=r"the weight a is beyond what float16 holds"):
        list(Merged({"a": [Full(value=np.full(shape, 60000, np.float32), factor=1.0)]}, own, []).pieces("a"))
    huge = [LowRank(down=change.down, up=1e6 * change.up, mid=None, factor=1.0) for change in changes]
    with pytest.raises(InputError, match=r"the weight a is beyond what float16 holds"):
        list(Merged({"a": huge}, own, []).pieces("a"))
