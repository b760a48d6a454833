"""Rewritten graphs compute in ONNX Runtime what the ones they were made from compute there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from calotype.engine.cpu_operators import rewrite
from tests.engine.graphs import Array, model, operators, run

RNG = np.random.default_rng(0)


def check(made: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    before = onnx.ModelProto()
    before.CopyFrom(made)
    assert sum(rewrite(made).values()) == 1
    expected, got = run(before, feeds), run(made, feeds)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_group_normalization(dtype: type) -> None:
    weights = {name: RNG.standard_normal(12).astype(dtype) for name in ("scale", "bias")}
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=4, epsilon=1e-3)
    made = model([node], {"x": ["b", 12, "h", "w"]}, weights)
    check(made, {"x": RNG.standard_normal((2, 12, 5, 3), np.float32) * 3 + 1})
    assert "GroupNormalization" not in operators(made)


def attention(heads: int, **attributes: Any) -> onnx.ModelProto:
    """Queries (2, 7, 24), keys and values (2, 5, 24), as projections leave them, through one Attention node."""
    make, nodes, lengths = helper.make_node, [], {"q": 7, "k": 5, "v": 5}
    constants = {"rows": np.array([2]), "heads": np.array([heads]), "d": np.array([24 // heads])}
    for name, length in lengths.items():
        constants[f"{name}.length"] = np.array([length])
        nodes += [
            make("Concat", ["rows", f"{name}.length", "heads", "d"], [f"{name}.shape"], axis=0),
            make("Reshape", [name, f"{name}.shape"], [f"{name}.split"]),
            make("Transpose", [f"{name}.split"], [f"{name}.apart"], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        make("Attention", [f"{name}.apart" for name in lengths], ["a"], **attributes),
        make("Transpose", ["a"], ["turned"], perm=[0, 2, 1, 3]),
        make("Reshape", ["turned", "whole"], ["y"]),
    ]
    inputs: dict[str, list[Any]] = {name: [2, length, 24] for name, length in lengths.items()}
    return model(nodes, inputs, {**constants, "whole": np.array([2, 7, 24])})


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.7}, {"is_causal": 0, "softcap": 0.0}])
def test_attention(attributes: dict[str, Any]) -> None:
    made = attention(3, **attributes)
    check(made, {name: RNG.standard_normal((2, 7 if name == "q" else 5, 24), np.float32) for name in "qkv"})
    assert operators(made) == ["MultiHeadAttention"]


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"softcap": 5.0}])
def test_attention_of_another_kind_stays(attributes: dict[str, Any]) -> None:
    made = attention(3, **attributes)
    assert rewrite(made) == {}
    assert "Attention" in operators(made)
