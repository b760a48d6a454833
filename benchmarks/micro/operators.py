"""A few operators as a graph of their own, opened to be timed in turn with other forms of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from calotype.engine.graph import CONTRIB


def node(kind: str, inputs: str, outputs: str, **how: Any) -> onnx.NodeProto:
    """An operator; names with a space between them."""
    return helper.make_node(kind, inputs.split(), outputs.split(), **how)


def opened(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any]) -> Any:
    """A session of ONNX Runtime on the CPU that computes ``y`` from ``x``, both float32."""
    edges = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "operators", edges[:1], edges[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The threads of the one whose turn it was would take a core from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
