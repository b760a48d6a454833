"""Inputs for image prompts, added to the graph of a UNet: keys and values that each cross-attention reads, too.

Ye et al. 2023, "IP-Adapter" (arXiv 2308.06721): attention to image tokens, beside that to the prompt and with the same
queries, is added to what comes out. Values carry their scale already, in which attention is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import ExportError

CONTEXT = "encoder_hidden_states"
THROUGH = ("Transpose", "Reshape", "MatMul", "Cast")  # from a prompt to keys


def add_image_prompts(graph: ir.Graph, prompts: Sequence[TensorSpec]) -> None:
    """Make inputs of ``prompts``: keys and values for each block in the order of computing, and last the scores' bias.

    Raises:
        ExportError: the graph has not as many cross-attentions.
    """
    if not prompts:
        return
    attentions = [node for node in graph if _is_cross_attention(node)]
    *pairs, bias = (_input(graph, spec) for spec in prompts)
    counts = [int(spec.shape[1]) for spec in prompts[:-1:2]]
    if sum(counts) != len(attentions):
        raise ExportError(
            f"the UNet's graph has {len(attentions)} cross-attentions, and it has {sum(counts)}; "
            "report this with the versions of torch and onnxscript"
        )
    first = _Maker(graph)
    axes = first.constant("image_bias.axes", np.array([1, 3]))
    lifted = first.op("Unsqueeze", [bias, axes], "image_bias.lifted")  # (rows, 1, A, 1, N)
    graph.insert_before(graph[0], first.nodes)
    waiting = iter(attentions)
    for count, keys, values in zip(counts, pairs[::2], pairs[1::2], strict=True):
        own = [next(waiting) for _ in range(count)]
        _add_block(graph, own, keys, values, lifted)


def _add_block(graph: ir.Graph, attentions: list[ir.Node], keys: ir.Value, values: ir.Value, bias: ir.Value) -> None:
    """Have the cross-attentions of one block read ``keys`` and ``values`` (rows, L, A, N, C)."""
    _, heads, _, size = attentions[0].outputs[0].shape or (None, None, None, None)
    if not isinstance(heads, int) or not isinstance(size, int):
        raise ExportError("the heads of a cross-attention are not known; report this with the version of torch")
    before = _Maker(graph)
    stem = str(keys.name).removesuffix("_keys")
    split = before.constant(f"{stem}.split", np.array([0, 0, 0, 0, heads, size]))
    halved = before.op("Reshape", [keys, split], f"{stem}_keys.split")
    turned = before.op("Transpose", [halved], f"{stem}_keys.turned", perm=[1, 0, 4, 2, 5, 3])  # (L, rows, h, A, d, N)
    scale = before.constant(f"{stem}.scale", np.float32(size**-0.5))
    scaled = before.op("Mul", [turned, scale], f"{stem}_keys.scaled")
    parted = before.op("Reshape", [values, split], f"{stem}_values.split")
    ready = before.op("Transpose", [parted], f"{stem}_values.turned", perm=[1, 0, 4, 2, 3, 5])  # (L, rows, h, A, N, d)
    graph.insert_before(graph[0], before.nodes)
    third = before.constant(f"{stem}.third", np.array([2]))
    for number, attention in enumerate(attentions):
        out, name = attention.outputs[0], f"{stem}_{number}"
        users = list(out.uses())
        after = _Maker(graph)
        index = after.constant(f"{name}.index", np.array(number))
        query = attention.inputs[0]
        key = after.op("Gather", [scaled, index], f"{name}.keys", axis=0)
        value = after.op("Gather", [ready, index], f"{name}.values", axis=0)
        lifted = after.op("Unsqueeze", [query, third], f"{name}.query")  # (rows, h, 1, n, d)
        scores = after.op("MatMul", [lifted, key], f"{name}.scores")  # (rows, h, A, n, N)
        biased = after.op("Add", [scores, bias], f"{name}.biased")
        shares = after.op("Softmax", [biased], f"{name}.shares", axis=-1)
        read = after.op("MatMul", [shares, value], f"{name}.read")  # (rows, h, A, n, d)
        added = after.op("ReduceSum", [read, third], f"{name}.added", keepdims=0)
        total = after.op("Add", [out, added], f"{name}.total")
        total.shape = out.shape
        graph.insert_after(attention, after.nodes)
        for user, place in users:
            user.replace_input_with(place, total)


class _Maker:
    """Makes nodes and constants of a graph; the nodes are for the caller to insert."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, value: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(value), name=name)
        shape = ir.Shape(np.shape(value))
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._graph.initializers[name] = made
        return made

    def op(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"node_{name}")
        made = node.outputs[0]
        made.name, made.type = name, ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return made


def _input(graph: ir.Graph, spec: TensorSpec) -> ir.Value:
    made = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(spec.shape)))
    graph.inputs.append(made)
    return made


def _is_cross_attention(node: ir.Node) -> bool:
    """Whether it is an attention whose keys are made of the prompt."""
    value = node.inputs[1] if node.op_type == "Attention" else None
    while value is not None and value.name != CONTEXT:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in THROUGH else None
    return value is not None
