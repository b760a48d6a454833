"""Small graphs to be rewritten, and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


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
