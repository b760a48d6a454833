"""How much memory a graph's activations take, before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Shape = tuple[int, ...]
FUSED_HEADS = range(16, 257)  # sizes that TensorRT-RTX 1.7 has fused attention for, in float16: 8 and 512 are not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A shape, and the bytes of one element."""

    shape: Shape
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * self.itemsize


def estimate_activations(graph: Path, shapes: Mapping[str, Shape]) -> int:
    """The most bytes that live at once when the nodes of ``graph`` run one after the other at these input shapes.

    A builder fuses nodes, which saves some, and takes scratch memory, which costs some: this is a scale, not a bound.
    Weights, and what is computed from them alone, do not count. What an operator makes that ONNX knows no shape of is
    taken to be as large as its largest input.
    """
    model = onnx.load(graph, load_external_data=False)
    tensors = infer_tensors(model, shapes)
    constant = {item.name for item in model.graph.initializer} | {""}
    bytes_of = {name: tensors[name].nbytes for name in shapes}
    last = {name: index for index, node in enumerate(model.graph.node) for name in (*node.output, *node.input)}
    live = peak = 0
    for index, node in enumerate(model.graph.node):
        if constant.issuperset(node.input):
            constant.update(node.output)
            continue
        inputs = [name for name in dict.fromkeys(node.input) if name not in constant]
        for name in node.output:
            known = tensors.get(name)
            bytes_of[name] = max(bytes_of[item] for item in inputs) if known is None else known.nbytes
            live += bytes_of[name]
        peak = max(peak, live + _scores(node, tensors))
        live -= sum(bytes_of[name] for name in (*inputs, *node.output) if last[name] == index and name not in shapes)
    return peak


def _scores(node: onnx.NodeProto, tensors: Mapping[str, Tensor]) -> int:
    """What attention keeps besides where no fused kernel takes it, in float32 or at other head sizes: its products."""
    if node.op_type != "Attention" or not tensors.keys() >= set(node.input[:2]):
        return 0
    query, key = tensors[node.input[0]], tensors[node.input[1]]
    if len(query.shape) == 4:  # (B, heads, length, head size)
        heads, head_size = query.shape[1], query.shape[3]
    else:  # (B, length, heads * head size)
        heads = next(item.i for item in node.attribute if item.name == "q_num_heads")
        head_size = query.shape[2] // heads
    if query.itemsize < 4 and head_size in FUSED_HEADS:
        return 0
    lengths = query.shape[-2] * key.shape[-2]
    return 2 * query.shape[0] * heads * lengths * query.itemsize  # the scores, and their softmax


def infer_tensors(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The values of a graph by name, but for those of which no shape is found."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for item in copy.graph.input:
        for dimension, size in zip(item.type.tensor_type.shape.dim, shapes[item.name], strict=True):
            dimension.Clear()
            dimension.dim_value = size
    sizes = _computed_from_sizes(copy, shapes)
    nodes = [node for node in copy.graph.node if not sizes.keys() >= set(node.output)]
    for node in nodes:
        if node.op_type == "GroupNormalization":  # whose shape ONNX does not infer
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in sizes.items())
    for item in copy.graph.output:
        item.type.tensor_type.ClearField("shape")
    copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    found = {name: Tensor(shape=value.shape, itemsize=value.itemsize) for name, value in sizes.items()}
    for item in (*copy.graph.value_info, *copy.graph.output, *copy.graph.input):
        tensor = item.type.tensor_type
        dimensions = tuple(dimension.dim_value for dimension in tensor.shape.dim)
        if tensor.HasField("shape") and all(dimensions):
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[item.name] = Tensor(shape=dimensions, itemsize=itemsize)
    return found


def _computed_from_sizes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
    """What follows from the inputs' shapes alone: ONNX's inference follows it through a few operators only."""
    constants = {item.name: item for item in model.graph.initializer if not item.external_data}
    names: set[str] = set()
    nodes = []
    for node in model.graph.node:
        measures = node.op_type == "Shape" and node.input[0] in shapes
        if measures or (not names.isdisjoint(node.input) and (names | constants.keys() | {""}).issuperset(node.input)):
            nodes.append(node)
            names.update(node.output)
    read = {name for node in nodes for name in node.input}
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in sorted(names)]
    inputs = [item for item in model.graph.input if item.name in read]
    initializers = [item for name, item in constants.items() if name in read]
    graph = onnx.helper.make_graph(nodes, "sizes", inputs, outputs, initializers)
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    feeds = {item.name: np.broadcast_to(np.float32(0), shapes[item.name]) for item in inputs}
    return dict(zip(sorted(names), evaluator.run(None, feeds), strict=True))
