"""Convolutions of few products compute in ONNX Runtime what plain ones compute there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from calotype.engine import winograd
from calotype.engine.graph import Graph
from tests.engine.graphs import Array, model, operators, run

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 4)


def convolution(dtype: type = np.float32, *, bias: bool = True, kernel: int = 3, **attributes: Any) -> onnx.ModelProto:
    """Of a picture of six channels to ten."""
    weights: dict[str, Array] = {"weight": RNG.standard_normal((10, 6, kernel, kernel)).astype(dtype)}
    weights |= {"bias": RNG.standard_normal(10).astype(dtype)} if bias else {}
    how = {"kernel_shape": [kernel, kernel], "pads": [1] * 4, **attributes}
    return model([helper.make_node("Conv", ["x", *weights], ["y"], **how)], {"x": ["b", 6, "h", "w"]}, weights)


def rewritten(made: onnx.ModelProto, largest: int = 4) -> onnx.ModelProto:
    """With the weights that it reads put into the graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    added = winograd.rewrite(copy, {}, largest)
    for tensor in copy.graph.initializer:
        if tensor.name in added:
            tensor.CopyFrom(onnx.numpy_helper.from_array(added[tensor.name], tensor.name))
    return copy


@pytest.mark.parametrize("m", [2, 4])
def test_tiles_of_one_row(m: int) -> None:
    """The definition, in one dimension: sums of products of what kernel and pixels are turned into."""
    back, kernel, tile = winograd.transforms(m)
    weights, pixels = RNG.standard_normal(3), RNG.standard_normal(m + 2)
    expected = np.correlate(pixels, weights, "valid")
    np.testing.assert_allclose(back @ ((kernel @ weights) * (tile @ pixels)), expected, atol=1e-13)


@pytest.mark.parametrize("size", [(8, 12), (5, 3), (7, 10), (1, 1), (4, 2)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("m", [2, 4])
def test_pixels_of_any_size(m: int, rows: int, size: tuple[int, int]) -> None:
    made = convolution()
    picture = {"x": RNG.standard_normal((rows, 6, *size), np.float32)}
    few = rewritten(made, m)
    expected, got = run(made, picture), run(few, picture)
    assert "FusedMatMul" in operators(few)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("size", [(6, 8), (5, 3), (1, 1), (9, 2)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("band", [1, 8, 1000])
@pytest.mark.parametrize("m", [2, 4])
def test_bands_of_a_picture_that_is_larger_than_the_input(
    m: int, band: int, rows: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "BAND", band)
    weights: dict[str, Array] = {"weight": RNG.standard_normal((10, 6, 3, 3)).astype(np.float32)}
    weights |= {"bias": RNG.standard_normal(10).astype(np.float32), "twice": np.array([1, 1, 2, 2], np.float32)}
    nodes = [
        helper.make_node("Resize", ["x", "", "twice"], ["doubled"], mode="nearest"),
        helper.make_node("Shape", ["x"], ["size"], start=2),  # of the input: not how large the doubled picture is
        helper.make_node("Concat", ["rows", "size"], ["shape"], axis=0),
        helper.make_node("Mul", ["shape", "larger"], ["larger_shape"]),
        helper.make_node("Reshape", ["doubled", "larger_shape"], ["same"]),
        helper.make_node("Conv", ["same", "weight", "bias"], ["y"], kernel_shape=[3, 3], pads=[1] * 4),
    ]
    weights |= {"rows": np.array([-1, 6]), "larger": np.array([1, 1, 2, 2])}
    made = model(nodes, {"x": ["b", 6, "h", "w"]}, weights)
    picture = {"x": RNG.standard_normal((rows, 6, *size), np.float32)}
    banded = rewritten(made, m)
    expected, got = run(made, picture), run(banded, picture)
    assert "Scan" in operators(banded)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_any_kind(dtype: type, bias: bool) -> None:
    made = convolution(dtype, bias=bias)
    picture = {"x": RNG.standard_normal((2, 6, 6, 5), np.float32)}
    expected, got = run(made, picture), run(rewritten(made), picture)
    np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [0] * 4},
        {"strides": [2, 2]},
        {"dilations": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
        {"kernel": 1},
    ],
)
def test_another_convolution_stays(attributes: dict[str, Any]) -> None:
    assert operators(rewritten(convolution(**attributes))) == ["Conv"]


def test_few_channels_and_tiles_of_one_pixel_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators(rewritten(convolution(), largest=1)) == ["Conv"]
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 7)
    assert operators(rewritten(convolution())) == ["Conv"]


def test_large_kernels_take_small_tiles_and_none_where_the_picture_is_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down, on the way, and up again: as in a UNet."""
    kinds = {"in": 1, "halved": 2, "deepest": 1, "out": 1}
    nodes, last = [], "x"
    for name, stride in kinds.items():
        if name == "out":
            nodes.append(helper.make_node("Resize", [last, "", "twice"], ["doubled"], mode="nearest"))
            last = "doubled"
        nodes.append(helper.make_node("Conv", [last, f"{name}.w"], [name], strides=[stride] * 2, pads=[1] * 4))
        last = name
    weights: dict[str, Array] = {f"{name}.w": RNG.standard_normal((6, 6, 3, 3)).astype(np.float32) for name in kinds}
    nodes[-1].output[0] = "y"
    made = model(nodes, {"x": ["b", 6, "h", "w"]}, {**weights, "twice": np.array([1, 1, 2, 2], np.float32)})
    graph = Graph(made.graph)
    assert winograd.halvings(graph) == [0, 1, 1, 0, 0]
    assert winograd.tiles(graph) == {0: 4, 2: 4, 4: 4}
    assert winograd.growth(graph) == 3 * 4 * 36 * (36 - 9)
    monkeypatch.setattr(winograd, "LARGEST_KERNEL", 35)
    assert winograd.tiles(graph) == {0: 2, 4: 2}
    picture = {"x": RNG.standard_normal((2, 6, 8, 8), np.float32)}
    expected, got = run(made, picture), run(rewritten(made), picture)
    np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())
