"""Rewritten graphs compute in ONNX Runtime what the ones they were made from compute there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calotype.engine.cpu_operators import rewrite

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], constants: dict[str, Array], opset: int = 23
) -> onnx.ModelProto:
    """Of float32 inputs and the output ``y``; weights in float16, as bundles hold them, are cast in the graph."""
    casts = []
    for name, value in list(constants.items()):
        if value.dtype == np.float16:
            constants[f"{name}.stored"] = constants.pop(name)
            casts.append(helper.make_node("Cast", [f"{name}.stored"], [name], to=TensorProto.FLOAT))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    graph = helper.make_graph(
        [*casts, *nodes],
        "g",
        values,
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(made: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output: Array = session.run(None, feeds)[0]
    return output


def operators(made: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in made.graph.node]


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


def doubling(
    to_another: bool = False, *, bias: bool = True, dtype: type = np.float32, **attributes: Any
) -> onnx.ModelProto:
    """A picture of six channels, resized and convolved to ten; ``to_another``'s size, or twice its own."""
    make, nodes = helper.make_node, []
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    weights = {"weight": RNG.standard_normal((10, 6, 3, 3)).astype(dtype)}
    weights |= {"bias": RNG.standard_normal(10).astype(dtype)} if bias else {}
    constants = {"scales": np.array([1, 1, 2, 2], np.float32)}
    inputs: dict[str, list[Any]] = {"x": ["b", 6, "h", "w"]}
    if to_another:
        inputs["other"] = ["b", 6, "h2", "w2"]
        nodes += [make("Shape", ["other"], ["sizes"]), make("Resize", ["x", "", "", "sizes"], ["r"], **how)]
    else:
        nodes += [make("Resize", ["x", "", "scales"], ["r"], **how)]
    settings = {"pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1, **attributes}
    nodes += [make("Conv", ["r", *weights], ["y"], kernel_shape=[3, 3], **settings)]
    return model(nodes, inputs, {**weights, **constants})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_doubling(dtype: type, bias: bool) -> None:
    made = doubling(bias=bias, dtype=dtype)
    check(made, {"x": RNG.standard_normal((2, 6, 5, 3), np.float32)})
    assert "Resize" not in operators(made)


@pytest.mark.parametrize("size", [(10, 6), (9, 6), (10, 5), (9, 5)])
def test_doubling_to_the_size_of_another_picture_that_may_be_a_row_less(size: tuple[int, int]) -> None:
    made = doubling(True)
    feeds = {"x": RNG.standard_normal((2, 6, 5, 3), np.float32), "other": np.zeros((2, 6, *size), np.float32)}
    check(made, feeds)
    assert "If" in operators(made)


@pytest.mark.parametrize("attributes", [{"pads": [0] * 4}, {"strides": [2, 2]}, {"dilations": [2, 2]}])
def test_another_convolution_stays(attributes: dict[str, Any]) -> None:
    assert rewrite(doubling(**attributes)) == {}


def test_what_others_read_stays() -> None:
    made = doubling()
    made.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, None))
    assert rewrite(made) == {}
