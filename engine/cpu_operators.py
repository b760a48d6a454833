"""A graph in the operators that ONNX Runtime is fastest at on a processor; it computes the same.

ONNX Runtime takes ``GroupNormalization`` apart into a dozen nodes; its ``InstanceNormalization`` is one kernel. Its
``Attention`` writes every logit down, 4096 x 4096 of them a head for a picture of 512 x 512; its own
``MultiHeadAttention`` (com.microsoft) goes through them in blocks that fit the cache (Dao et al. 2022,
arXiv 2205.14135) and takes tokens as matrix products leave them. A convolution of a picture that was just doubled reads
every pixel four times: for each of the four places that a pixel of the double one can have in its original, the rows
and columns of the kernel that meet the same pixel are added up beforehand, which leaves 2 x 2 of 3 x 3.

Weights are changed by nodes that depend on constants alone, which ONNX Runtime computes once, when an engine is built.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"
HEADS = [0, 2, 1, 3]  # (B, T, heads, D) <-> (B, heads, T, D)
# Which of a kernel's three rows meet the upper and the lower pixel, for the first and the second row of a doubled one.
PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
PADS = ((1, 0), (0, 1))  # before and after, likewise


def rewrite(model: onnx.ModelProto) -> dict[str, int]:
    """Rewrite ``model`` in place; returns how many of which operator were replaced."""
    graph = Graph(model.graph)
    done: Counter[str] = Counter()
    for node in list(model.graph.node):
        rewriter = REWRITERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rewriter is not None and rewriter(graph, node):
            done[node.op_type] += 1
    graph.finish()
    if not any(opset.domain == CONTRIB for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return dict(done)


class Graph:
    """A graph, who makes and who reads each of its values, and what replaces its nodes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self.nodes = list(graph.node)
        self.makers = {name: node for node in graph.node for name in node.output}
        self._readers = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._outputs = {item.name for item in graph.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._instead: dict[str, list[onnx.NodeProto]] = {}

    def only_reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of that type, where nothing else reads ``name``."""
        readers = self._readers[name]
        alone = len(readers) == 1 and readers[0].op_type == op_type and name not in self._outputs
        return readers[0] if alone else None

    def weight(self, name: str) -> list[int] | None:
        """The shape of the initializer that ``name`` is, or is cast from."""
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Cast":
            name = maker.input[0]
        return list(self.initializers[name].dims) if name in self.initializers else None

    def integers(self, name: str) -> list[int] | None:
        """The values of an int64 initializer that stands in the graph."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
            return None
        return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]

    def floats(self, name: str) -> list[float] | None:
        """The values of a float32 initializer that stands in the graph."""
        tensor = self.initializers.get(name)
        inside = tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL
        if tensor is None or not inside or tensor.data_type != onnx.TensorProto.FLOAT:
            return None
        return [float(value) for value in numpy_helper.to_array(tensor).reshape(-1)]

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer; returns its name."""
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def external(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer whose values are given beside the graph; returns its name."""
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=value.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        self._graph.initializer.append(tensor)
        return name

    def replace(self, last: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put ``nodes`` in the place of ``last``. What led to it and is read by nobody any more goes, too."""
        self._instead[last.output[0]] = list(nodes)

    def finish(self) -> None:
        """Write the replacements into the graph."""
        nodes = [made for node in self._graph.node for made in self._instead.get(node.output[0], [node])]
        read, kept = set(self._outputs), []
        for node in reversed(nodes):  # a node stands before those that read it
            if read.intersection(node.output):
                kept.append(node)
                read.update(_reads(node))
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))
        kept_tensors = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept_tensors)


def group_normalization(graph: Graph, node: onnx.NodeProto) -> bool:
    """Groups normalised as the channels of another shape, then scaled and shifted by channel."""
    how, (x, scale, bias), (out,) = _attributes(node), node.input, node.output
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
    how = _attributes(node)
    plain = not any(how.get(name) for name in ("is_causal", "softcap", "qk_matmul_output_mode"))
    if not plain or len(node.input) != 3:
        return False
    apart = [_heads_apart(graph, name) for name in node.input]
    turned = graph.only_reader(node.output[0], "Transpose")
    joined = None if turned is None else graph.only_reader(turned.output[0], "Reshape")
    found = [item for item in apart if item is not None]
    if len(found) != 3 or len({heads for _, heads in found}) != 1 or turned is None or joined is None:
        return False
    if _attributes(turned).get("perm") != HEADS:
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
    if turned is None or turned.op_type != "Transpose" or _attributes(turned).get("perm") != HEADS:
        return None
    split = graph.makers.get(turned.input[0])
    shape = graph.makers.get(split.input[1]) if split is not None and split.op_type == "Reshape" else None
    if split is None or shape is None or shape.op_type != "Concat" or len(shape.input) != 4:
        return None
    heads = graph.integers(shape.input[2])
    return None if heads is None else (split.input[0], heads[0])


def doubling(graph: Graph, node: onnx.NodeProto) -> bool:
    """A picture doubled and then convolved, as four convolutions of the picture and their pixels put in turn.

    Where the size is another value's, it may be a row less than double: then what stood there runs.
    """
    how = _attributes(node)
    nearest = (how.get("mode"), how.get("coordinate_transformation_mode"), how.get("nearest_mode"))
    conv = graph.only_reader(node.output[0], "Conv")
    if nearest != (b"nearest", b"asymmetric", b"floor") or conv is None or conv.input[0] != node.output[0]:
        return False
    settings, kernel = _attributes(conv), graph.weight(conv.input[1])
    usual = {"pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
    if any(settings.get(name) != value for name, value in usual.items()) or kernel is None or kernel[2:] != [3, 3]:
        return False
    x, out = node.input[0], conv.output[0]
    if len(node.input) == 3 and graph.floats(node.input[2]) == [1, 1, 2, 2]:
        graph.replace(conv, _phases(graph, x, conv, kernel, out))
    elif len(node.input) == 4:
        graph.replace(conv, _where_it_doubles(graph, node, conv, kernel))
    else:
        return False
    return True


def _phases(graph: Graph, x: str, conv: onnx.NodeProto, kernel: list[int], out: str) -> list[onnx.NodeProto]:
    """The nodes that compute ``conv`` on ``x`` (B, C, H, W) doubled."""
    _, weight, *bias = conv.input
    flat = graph.constant(f"{out}.flat", np.array([-1, 9]))
    small = graph.constant(f"{out}.small", np.array([*kernel[:2], 2, 2]))
    make, parts = helper.make_node, []
    own = _copied(graph, bias, [[-1]], [f"{out}.bias"])
    rest = [node.output[0] for node in own]
    made = [make("Reshape", [weight, flat], [f"{out}.kernel"]), *own]
    for row, column in itertools.product(range(2), repeat=2):
        name = f"{out}.{row}{column}"
        sums = np.einsum("iy,jx->yxij", PHASES[row], PHASES[column]).reshape(9, 4)
        pads = [PADS[row][0], PADS[column][0], PADS[row][1], PADS[column][1]]
        made += [
            make("MatMul", [f"{out}.kernel", graph.constant(f"{name}.sums", sums)], [f"{name}.flat"]),
            make("Reshape", [f"{name}.flat", small], [f"{name}.weight"]),
            make(
                "Conv",
                [x, f"{name}.weight", *rest],
                [name],
                kernel_shape=[2, 2],
                pads=pads,
            ),
        ]
        parts.append(name)
    return [
        *made,
        make("Concat", parts, [f"{out}.parts"], axis=1),  # (B, 4 C, H, W)
        make("DepthToSpace", [f"{out}.parts"], [out], blocksize=2, mode="DCR"),
    ]


def _where_it_doubles(
    graph: Graph, resize: onnx.NodeProto, conv: onnx.NodeProto, kernel: list[int]
) -> list[onnx.NodeProto]:
    """Phases where the sizes that ``resize`` is given are twice its input's, else the two nodes as they are.

    ONNX Runtime lays out anew only those weights that stand in the graph of their convolution: a branch has its own.
    """
    make, (out,) = helper.make_node, conv.output
    twice = graph.constant(f"{out}.twice", np.array([1, 1, 2, 2]))
    own = _copied(graph, conv.input[1:], [kernel, [-1]], [f"{out}.own_weight", f"{out}.own_bias"])
    plain = make("Conv", [resize.output[0], *(node.output[0] for node in own)], [f"{out}.plain"])
    plain.attribute.extend(conv.attribute)
    phases = _phases(graph, resize.input[0], conv, kernel, f"{out}.phases")
    branches = {
        name: helper.make_graph(nodes, f"{out}.{name}", [], [helper.make_empty_tensor_value_info(nodes[-1].output[0])])
        for name, nodes in (("then_branch", phases), ("else_branch", [*own, resize, plain]))
    }
    return [
        make("Shape", [resize.input[0]], [f"{out}.from"]),
        make("Mul", [f"{out}.from", twice], [f"{out}.doubled"]),
        make("Equal", [f"{out}.doubled", resize.input[3]], [f"{out}.equal"]),
        make("Cast", [f"{out}.equal"], [f"{out}.ones"], to=onnx.TensorProto.INT64),
        make("ReduceMin", [f"{out}.ones"], [f"{out}.one"], keepdims=0),
        make("Cast", [f"{out}.one"], [f"{out}.doubles"], to=onnx.TensorProto.BOOL),
        make("If", [f"{out}.doubles"], [out], **branches),
    ]


def _copied(
    graph: Graph, names: Sequence[str], shapes: Sequence[list[int]], copies: Sequence[str]
) -> list[onnx.NodeProto]:
    """Nodes that give the weights ``names``, of these shapes, other names; of the three, as many as there are names."""
    return [
        helper.make_node("Reshape", [name, graph.constant(f"{copy}.shape", np.array(shape))], [copy])
        for name, shape, copy in zip(names, shapes, copies, strict=False)
    ]


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, itself and in its branches."""
    branches = [item.g.node for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    return set(node.input).union(*(_reads(inner) for nodes in branches for inner in nodes))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


REWRITERS = {"GroupNormalization": group_normalization, "Attention": attention, "Resize": doubling}
