"""How much memory a graph's activations take, before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import onnx

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A shape as far as ONNX infers it, 0 where it does not, and the bytes of one element."""

    shape: Shape
    itemsize: int


def estimate_activations(graph: Path, shapes: Mapping[str, Shape]) -> int:
    """The most bytes that live at once when the nodes of ``graph`` run one after the other at these input shapes.

    A builder fuses nodes, which saves some, and takes scratch memory, which costs some: this is a scale, not a bound.
    Weights, and what is computed from them alone, do not count.
    """
    model = onnx.load(graph, load_external_data=False)
    tensors = _infer(model, shapes)
    batch = next(iter(shapes.values()))[0]
    constant = {item.name for item in model.graph.initializer} | {""}
    bytes_of = {name: math.prod(shape) * tensors[name].itemsize for name, shape in shapes.items()}
    last = {name: index for index, node in enumerate(model.graph.node) for name in (*node.output, *node.input)}
    live = peak = 0
    for index, node in enumerate(model.graph.node):
        if constant.issuperset(node.input):
            constant.update(node.output)
            continue
        inputs = [name for name in dict.fromkeys(node.input) if name not in constant]
        for name in node.output:
            bytes_of[name] = _output_bytes(node, tensors, bytes_of, inputs, tensors.get(name))
            live += bytes_of[name]
        peak = max(peak, live + _scores(node, tensors, bytes_of, batch))
        live -= sum(bytes_of[name] for name in (*inputs, *node.output) if last[name] == index and name not in shapes)
    return peak


def _output_bytes(
    node: onnx.NodeProto,
    tensors: Mapping[str, _Tensor],
    bytes_of: Mapping[str, int],
    inputs: list[str],
    output: _Tensor | None,
) -> int:
    """As inferred; where a shape is not, as large as the largest input, which fits what transformers are made of."""
    if output is not None and all(output.shape):
        return math.prod(output.shape) * output.itemsize
    largest = max(bytes_of[name] for name in inputs)
    if node.op_type == "Split":
        return largest // len(node.output)
    matrix = tensors[node.input[1]].shape if node.op_type == "MatMul" and node.input[1] in tensors else ()
    return largest * matrix[1] // matrix[0] if len(matrix) == 2 and all(matrix) else largest


def _scores(node: onnx.NodeProto, tensors: Mapping[str, _Tensor], bytes_of: Mapping[str, int], batch: int) -> int:
    """What attention in float32 keeps besides: no fused kernel takes it, so its products lie in memory."""
    query = tensors.get(node.input[0]) if node.op_type == "Attention" else None
    if query is None or query.itemsize < 4 or len(query.shape) != 4 or 0 in query.shape[1::2]:
        return 0
    _, heads, _, head_size = query.shape  # (B, heads, length, head size)
    token = heads * head_size * query.itemsize
    lengths = bytes_of[node.input[0]] // token * (bytes_of[node.input[1]] // token // batch)
    return 2 * lengths * heads * query.itemsize  # the scores, and their softmax


def _infer(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, _Tensor]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "GroupNormalization":  # whose shape ONNX does not infer
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    for item in copy.graph.input:
        for dimension, size in zip(item.type.tensor_type.shape.dim, shapes[item.name], strict=True):
            dimension.Clear()
            dimension.dim_value = size
    del copy.graph.value_info[:]
    for item in copy.graph.output:
        item.type.tensor_type.ClearField("shape")
    copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    found = {}
    for item in (*copy.graph.value_info, *copy.graph.output, *copy.graph.input):
        tensor = item.type.tensor_type
        if tensor.HasField("shape"):
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            dimensions = tuple(dimension.dim_value for dimension in tensor.shape.dim)
            found[item.name] = _Tensor(shape=dimensions, itemsize=itemsize)
    return found
