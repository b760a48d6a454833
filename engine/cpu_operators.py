"""A graph in the operators that ONNX Runtime is fastest at on a processor; it computes the same.

ONNX Runtime takes ``GroupNormalization`` apart into a dozen nodes; its ``InstanceNormalization`` is one kernel. Its
``Attention`` writes every logit down, 4096 x 4096 of them a head for a picture of 512 x 512; its own
``MultiHeadAttention`` (com.microsoft) goes through them in blocks that fit the cache (Dao et al. 2022,
arXiv 2205.14135) and takes tokens as matrix products leave them.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper

from calotype.engine.graph import CONTRIB, Graph, attributes, import_contrib

HEADS = [0, 2, 1, 3]  # (B, T, heads, D) <-> (B, heads, T, D)


def rewrite(model: onnx.ModelProto) -> dict[str, int]:
    """Rewrite ``model`` in place; returns how many of which operator were replaced."""
    graph = Graph(model.graph)
    done: Counter[str] = Counter()
    for node in list(model.graph.node):
        rewriter = REWRITERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rewriter is not None and rewriter(graph, node):
            done[node.op_type] += 1
    graph.finish()
    import_contrib(model)
    return dict(done)


def group_normalization(graph: Graph, node: onnx.NodeProto) -> bool:
    """Groups normalised as the channels of another shape, then scaled and shifted by channel."""
    how, (x, scale, bias), (out,) = attributes(node), node.input, node.output
    groups = how["num_groups"]
    one, zero = (graph.constant(f"{out}.{value}", np.full(groups, value, np.float32)) for value in (1, 0))
    column = graph.constant(f"{out}.column", np.array([-1, 1, 1]))
    grouped = graph.constant(f"{out}.grouped", np.array([0, groups, -1]))
    epsilon = how.get("epsilon", 1e-5)
    make = helper.make_node
    graph.replace(
        node,
        [
            make("Reshape", [x, grouped], [f"{out}.groups"]),  # (B, groups, rest)
            make("InstanceNormalization", [f"{out}.groups", one, zero], [f"{out}.normal"], epsilon=epsilon),
            make("Shape", [x], [f"{out}.shape"]),
            make("Reshape", [f"{out}.normal", f"{out}.shape"], [f"{out}.whole"]),
            make("Reshape", [scale, column], [f"{out}.scale"]),
            make("Reshape", [bias, column], [f"{out}.bias"]),
            make("Mul", [f"{out}.whole", f"{out}.scale"], [f"{out}.scaled"]),
            make("Add", [f"{out}.scaled", f"{out}.bias"], [out]),
        ],
    )
    return True


def attention(graph: Graph, node: onnx.NodeProto) -> bool:
    """Where heads are taken apart before it and put together after it, and nothing is masked."""
    how = attributes(node)
    plain = not any(how.get(name) for name in ("is_causal", "softcap", "qk_matmul_output_mode"))
    if not plain or len(node.input) != 3:
        return False
    apart = [_heads_apart(graph, name) for name in node.input]
    turned = graph.only_reader(node.output[0], "Transpose")
    joined = None if turned is None else graph.only_reader(turned.output[0], "Reshape")
    found = [item for item in apart if item is not None]
    if len(found) != 3 or len({heads for _, heads in found}) != 1 or turned is None or joined is None:
        return False
    if attributes(turned).get("perm") != HEADS:
        return False
    settings = {"scale": how["scale"]} if how.get("scale") else {}
    made = helper.make_node(
        "MultiHeadAttention",
        [tokens for tokens, _ in found],
        [joined.output[0]],
        domain=CONTRIB,
        num_heads=found[0][1],
        **settings,
    )
    graph.replace(joined, [made])
    return True


def _heads_apart(graph: Graph, name: str) -> tuple[str, int] | None:
    """The tokens (B, T, heads * D) that ``name`` (B, heads, T, D) is a view of, and how many heads."""
    turned = graph.makers.get(name)
    if turned is None or turned.op_type != "Transpose" or attributes(turned).get("perm") != HEADS:
        return None
    split = graph.makers.get(turned.input[0])
    shape = graph.makers.get(split.input[1]) if split is not None and split.op_type == "Reshape" else None
    if split is None or shape is None or shape.op_type != "Concat" or len(shape.input) != 4:
        return None
    heads = graph.integers(shape.input[2])
    return None if heads is None else (split.input[0], heads[0])


REWRITERS = {"GroupNormalization": group_normalization, "Attention": attention}
