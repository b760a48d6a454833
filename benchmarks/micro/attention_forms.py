"""Forms that attention can have in an ONNX graph in float16, from tokens to tokens as a transformer's layers hold them.

A graph is several layers, so that launching it costs little of its time. Each layer has keys and values of its own,
since optimisers prepare what is shared only once; and what it adds to the queries, as a transformer does, keeps the
transposes after one layer from cancelling those before the next.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.micro.operators import node

LAYERS = 8
# One node between the transposes that make heads of tokens, as this project exports it; one node that is given tokens;
# and, between the same transposes, what exporters write before opset 23.
OPSETS = {"Attention": 23, "Attention of tokens": 23, "parts": 20}


class Shape(NamedTuple):
    """The sizes of one attention; ``channels`` are a head's."""

    rows: int
    heads: int
    queries: int
    keys: int
    channels: int

    def tensors(self) -> dict[str, tuple[int, int, int]]:
        """The shapes of what goes into a graph and, last, of what comes out of it."""
        wide, keys = self.heads * self.channels, (f"{name}{layer}" for layer in range(LAYERS) for name in "kv")
        queries = (self.rows, self.queries, wide)
        return {"q": queries, **dict.fromkeys(keys, (self.rows, self.keys, wide)), "out": queries}


def model(form: str, shape: Shape) -> onnx.ModelProto:
    """A graph of ``LAYERS`` attentions, with dynamic sizes."""
    sizes = {"rows": shape.rows, "queries": shape.queries, "keys": shape.keys}
    sizes |= {"heads": shape.heads, "channels": shape.channels, "wide": shape.heads * shape.channels}
    constants = [numpy_helper.from_array(np.array([size]), name) for name, size in sizes.items()]
    constants.append(numpy_helper.from_array(np.array(shape.channels**-0.5, np.float16), "scale"))
    nodes = [
        node("Concat", "rows queries heads channels", "of_q", axis=0),
        node("Concat", "rows keys heads channels", "of_k", axis=0),
        node("Concat", "rows queries wide", "of_tokens", axis=0),
    ]
    for layer in range(LAYERS):
        q, out = f"x{layer}" if layer else "q", f"x{layer + 1}" if layer + 1 < LAYERS else "out"
        nodes += _attention(form, shape.heads, q, f"k{layer}", f"v{layer}", f"y{layer}")
        nodes.append(node("Add", f"{q} y{layer}", out))
    values = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT16, ["rows", "keys" if name[0] in "kv" else "queries", wide]
        )
        for name, (_, _, wide) in shape.tensors().items()
    ]
    graph = helper.make_graph(nodes, "attention", values[:-1], values[-1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSETS[form])], ir_version=10)


def _attention(form: str, heads: int, q: str, k: str, v: str, out: str) -> list[onnx.NodeProto]:
    if form == "Attention of tokens":
        return [node("Attention", f"{q} {k} {v}", out, q_num_heads=heads, kv_num_heads=heads)]
    nodes = []
    for name, tokens, sizes in (("q", q, "of_q"), ("k", k, "of_k"), ("v", v, "of_k")):
        nodes.append(node("Reshape", f"{tokens} {sizes}", f"{out}.{name}.split"))
        nodes.append(node("Transpose", f"{out}.{name}.split", f"{out}.{name}", perm=[0, 2, 1, 3]))
    if form == "Attention":
        nodes.append(node("Attention", f"{out}.q {out}.k {out}.v", f"{out}.heads"))
    else:
        nodes += [
            node("Mul", f"{out}.q scale", f"{out}.scaled"),
            node("Transpose", f"{out}.k", f"{out}.turned", perm=[0, 1, 3, 2]),
            node("MatMul", f"{out}.scaled {out}.turned", f"{out}.logits"),
            node("Softmax", f"{out}.logits", f"{out}.weights", axis=-1),
            node("MatMul", f"{out}.weights {out}.v", f"{out}.heads"),
        ]
    nodes.append(node("Transpose", f"{out}.heads", f"{out}.joined", perm=[0, 2, 1, 3]))
    return [*nodes, node("Reshape", f"{out}.joined of_tokens", out)]


def reference(
    shape: Shape, q: NDArray[np.float16], k: NDArray[np.float16], v: NDArray[np.float16]
) -> NDArray[np.float64]:
    """What a graph makes of some of its queries where every layer has the same keys and values, in float64."""

    def split(tokens: NDArray[np.float16] | NDArray[np.float64]) -> NDArray[np.float64]:
        return tokens.astype(np.float64).reshape(shape.rows, -1, shape.heads, shape.channels).transpose(0, 2, 1, 3)

    x, keys, values = q.astype(np.float64), split(k).swapaxes(2, 3) * shape.channels**-0.5, split(v)
    for _ in range(LAYERS):
        logits = split(x) @ keys
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        heads = weights @ values / weights.sum(-1, keepdims=True)
        x = x + heads.transpose(0, 2, 1, 3).reshape(x.shape)
    return x
