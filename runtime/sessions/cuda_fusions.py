"""Nodes of a graph that ONNX Runtime's CUDA kernels compute in one go, put together when a session opens.

On a GPU a small operator costs its start and a trip of its tensors to memory and back, and ONNX Runtime 1.31 leaves in
a UNet some four hundred of them standing alone: biases, residuals, the halves of gated units, transposes between the
channels-last convolutions and the tokens that attention takes. What puts them together is described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md; some take only Stable Diffusion's sizes.

With all of it, and with group norms that take the sums before them along, a step of SD 1.5's size at 512x512 takes 0.76
of its time on an H200; ``python -m benchmarks.micro fusions`` measures each. Repeated runs, which differ since group
norms add in no fixed order, differ as much with it as without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calotype.runtime.graphs.editor import Attribute, Graph, Node

CONTRIB = "com.microsoft"
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels, of four dimensions
GATED = (2560, 5120, 10240)  # channels that BiasSplitGelu takes, of both halves
ADDED = (320, 640, 1280)  # and BiasAdd
MOST_PARTS = 32  # of a Split that takes no table
PLAIN = {"alpha": 1, "beta": 1, "transA": 0}  # of a Gemm


def tokens_of_pixels(graph: Graph) -> None:
    """Tokens (B, H * W, C) from pixels, and back, by way of channels last: a view of them, where NCHW is none.

    The transposes that are left stand beside those of a convolution or a norm, and ONNX Runtime cancels both.
    """
    for node in graph.of("Transpose"):
        if node.attributes.get("perm") != (0, 2, 1):
            continue
        reshape = graph.producer(node.inputs[0], "Reshape")
        if reshape is not None and graph.only_user(reshape.outputs[0]) is node:
            _to_tokens(graph, reshape, node)
            continue
        reshape = graph.only_user(node.outputs[0], "Reshape")
        if reshape is not None:
            _to_pixels(graph, node, reshape)


def _to_tokens(graph: Graph, reshape: Node, transpose: Node) -> None:
    shape = graph.producer(reshape.inputs[1], "Concat")
    pixels, (out,) = graph.known(reshape.inputs[0]), transpose.outputs
    if shape is None or len(shape.inputs) != 3 or len(pixels.shape) != 4:
        return
    batch, channels, count = shape.inputs
    names = [f"{out}.nhwc", f"{out}.shape"]
    made = [
        Node(op="Transpose", inputs=reshape.inputs[:1], outputs=(names[0],), attributes={"perm": LAST}),
        Node(op="Concat", inputs=(batch, count, channels), outputs=(names[1],), attributes={"axis": 0}),
        Node(op="Reshape", inputs=(names[0], names[1]), outputs=(out,)),
    ]
    graph.replace([reshape, transpose], made)


def _to_pixels(graph: Graph, transpose: Node, reshape: Node) -> None:
    shape, (out,) = graph.producer(reshape.inputs[1], "Concat"), reshape.outputs
    if shape is None or len(shape.inputs) != 4:
        return
    batch, channels, height, width = shape.inputs
    names = [f"{out}.shape", f"{out}.nhwc"]
    made = [
        Node(op="Concat", inputs=(batch, height, width, channels), outputs=(names[0],), attributes={"axis": 0}),
        Node(op="Reshape", inputs=(transpose.inputs[0], names[0]), outputs=(names[1],)),
        Node(op="Transpose", inputs=(names[1],), outputs=(out,), attributes={"perm": FIRST}),
    ]
    graph.replace([transpose, reshape], made)


def gated_units(graph: Graph) -> None:
    """A linear layer's bias, and the product of one half of its channels with the other's GELU."""
    for split in graph.of("Split"):
        biased = _biased(graph, split.inputs[0])
        if biased is None or split.attributes.get("axis") != 2 or len(split.outputs) != 2:
            continue
        add, x, bias, channels = biased
        gelu = graph.only_user(split.outputs[1], "Gelu")
        product = None if gelu is None else graph.only_user(gelu.outputs[0], "Mul")
        if (
            channels in GATED
            and product is not None
            and gelu is not None
            and gelu.attributes.get("approximate", "none") == "none"
            and graph.only_user(split.outputs[0]) is product
            and graph.only_user(add.outputs[0]) is split
        ):
            made = Node(op="BiasSplitGelu", domain=CONTRIB, inputs=(x, bias), outputs=product.outputs)
            graph.replace([add, split, gelu, product], [made])


def layer_norms(graph: Graph) -> None:
    """A layer norm, the residual before it, and the bias of the linear layer before that."""
    for norm in graph.of("LayerNormalization"):
        add = graph.producer(norm.inputs[0], "Add")
        if add is None or len(norm.inputs) != 3 or norm.attributes.get("axis", -1) != -1 or len(norm.outputs) != 1:
            continue
        for branch, residual in (add.inputs, add.inputs[::-1]):
            biased = _biased(graph, branch)
            if biased is None or graph.only_user(branch) is not add or not alike(graph, branch, residual):
                continue
            bias_add, x, bias, _ = biased
            made = Node(
                op="SkipLayerNormalization",
                domain=CONTRIB,
                inputs=(x, residual, *norm.inputs[1:], bias),
                outputs=(norm.outputs[0], "", "", add.outputs[0]),
                attributes={"epsilon": float(norm.number("epsilon", 1e-5))},
            )
            graph.replace([bias_add, add, norm], [made])
            break


def residuals(graph: Graph) -> None:
    """The bias of a linear layer, and the residual after it."""
    for add in graph.of("Add"):
        for branch, residual in (add.inputs, add.inputs[::-1]):
            biased = _biased(graph, branch)
            if biased is None or graph.only_user(branch) is not add or not alike(graph, branch, residual):
                continue
            bias_add, x, bias, channels = biased
            if channels in ADDED and len(graph.known(branch).shape) == 3:
                made = Node(op="BiasAdd", domain=CONTRIB, inputs=(x, bias, residual), outputs=add.outputs)
                graph.replace([bias_add, add], [made])
                break


def linear_layers(graph: Graph) -> None:
    """Linear layers of one small input, of the timestep's embedding and of the prompt, as many as are of one width.

    What they make is split again. Of parts of unequal widths ONNX Runtime would look up the places in a table that it
    copies to the GPU from memory that it gives back, which a CUDA graph must not hold.
    """
    together = dict[tuple[str | int, ...], list[Node]]()
    for node in graph.of("Gemm"):
        weight = graph.weight(node.inputs[1])
        plain = [node.number(name, default) for name, default in PLAIN.items()] == [*PLAIN.values()]
        if plain and node.number("transB") == 1 and len(node.inputs) == 3 and weight is not None:
            together.setdefault((*_activated(graph, node.inputs[0]), *weight.shape), []).append(node)
    for node in graph.of("MatMul"):
        turn = graph.producer(node.inputs[1], "Transpose")
        weight = None if turn is None else graph.weight(turn.inputs[0])
        if weight is not None and _given(graph, node.inputs[0]):
            together.setdefault((node.inputs[0], *weight.shape), []).append(node)
    for nodes in together.values():
        for start in range(0, len(nodes), MOST_PARTS):
            if len(chosen := nodes[start : start + MOST_PARTS]) > 1:
                _merge(graph, chosen)


def _given(graph: Graph, name: str) -> bool:
    """Whether ``name`` is an input of the graph, or cast from one."""
    cast = graph.producer(name)
    return cast is None or (cast.op == "Cast" and graph.producer(cast.inputs[0]) is None)


def _activated(graph: Graph, name: str) -> tuple[str, ...]:
    """``name``, or the input of the SiLU that makes it: each block activates the same embedding anew."""
    product = graph.producer(name, "Mul")
    if product is not None:
        for x, gate in (product.inputs, product.inputs[::-1]):
            sigmoid = graph.producer(gate, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs == (x,):
                return (x, "SiLU")
    return (name,)


def _merge(graph: Graph, nodes: Sequence[Node]) -> None:
    x, (first, *_) = nodes[0].inputs[0], nodes[0].outputs
    names = [f"{first}.{part}" for part in ("weights", "turned", "biases", "all")]
    turns = [turn for node in nodes if (turn := graph.producer(node.inputs[1], "Transpose")) is not None]
    weights = tuple(turn.inputs[0] for turn in turns) or tuple(node.inputs[1] for node in nodes)
    made = [Node(op="Concat", inputs=weights, outputs=(names[0],), attributes={"axis": 0})]
    if turns:
        made.append(Node(op="Transpose", inputs=(names[0],), outputs=(names[1],), attributes={"perm": (1, 0)}))
        made.append(Node(op="MatMul", inputs=(x, names[1]), outputs=(names[3],)))
    else:
        biases = tuple(node.inputs[2] for node in nodes)
        made.append(Node(op="Concat", inputs=biases, outputs=(names[2],), attributes={"axis": 0}))
        made.append(Node(op="Gemm", inputs=(x, names[0], names[2]), outputs=(names[3],), attributes={"transB": 1}))
    outputs = tuple(node.outputs[0] for node in nodes)
    how: dict[str, Attribute] = {"axis": -1, "num_outputs": len(nodes)}
    made.append(Node(op="Split", inputs=(names[3],), outputs=outputs, attributes=how))
    graph.replace(nodes, made)


def _biased(graph: Graph, name: str) -> tuple[Node, str, str, int] | None:
    """Where ``name`` is a matrix product and a bias: the sum, the product, the bias and its length."""
    add = graph.producer(name, "Add")
    if add is None:
        return None
    for x, bias in (add.inputs, add.inputs[::-1]):
        weight = graph.weight(bias)
        if weight is not None and len(weight.shape) == 1 and graph.producer(x, "MatMul") and graph.only_user(x) is add:
            return add, x, bias, weight.last
    return None


def alike(graph: Graph, one: str, other: str) -> bool:
    """Whether both have one shape, which is known."""
    shape = graph.known(one).shape
    return bool(shape) and "" not in shape and shape == graph.known(other).shape


# What is put together, in this order.
FUSIONS: tuple[Callable[[Graph], None], ...] = (
    tokens_of_pixels,
    gated_units,
    layer_norms,
    residuals,
    linear_layers,
)
