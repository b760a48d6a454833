"""A graph in the operators that ONNX Runtime has CUDA kernels for, made in memory when a session opens.

ONNX Runtime 1.31 has no CUDA kernel for ``GroupNormalization``: it takes the operator apart, into some fifteen nodes.
Its own ``GroupNorm`` (com.microsoft) takes the activation along and has channels last, as its ``NhwcConv`` and tensor
cores do; its sums are atomic additions, so that an image's last bits may differ from one run to the next.
``MultiHeadAttention`` (com.microsoft) takes tokens as matrix products leave them, which saves ``Attention`` four
transposes. The provider's option ``prefer_nhwc`` does less, and puts the arithmetic of shapes on the GPU, with copies
that no CUDA graph can hold. The operators are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.

``ArgMax`` has kernels for floating-point numbers alone. Of integers it would run on the CPU, and SDXL's second text
encoder be no CUDA graph, four times as slow.

No ``Attention`` may stay but those that are causal. With heads of 160 channels and 256 tokens, as SD 1.5 has them at
512x512, it is wrong in float16: off by 1.3 of its outputs' norm (1.31.1, H200), where ``MultiHeadAttention`` is off by
0.001. Both have flash attention, on an H200 the latter cuDNN's and the former ONNX Runtime's own, which serves both on
GPUs before Hopper, where neither has been compared. The causal ones are the text encoders', of 77 tokens and heads of
64 channels, and were right.

Heads of more than 256 channels, the autoencoder's, are too wide for flash attention: in parts (MatMul, Softmax, MatMul)
they took 112 µs instead of 440 on the H200. The logits, and the weights made of them, then lie in memory: together
64 MiB at 512x512, 1 GiB at 1024x1024. Up to some 1450x1450 that is less than a decoder takes for its last level;
beyond, tiles keep it small.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.editor import FLOAT, FLOAT16, INT32, INT64, Graph, Node
from calotype.runtime.graphs.files import external_locations, read_model
from calotype.runtime.graphs.protobuf import field, fields
from calotype.runtime.sessions.cuda_fusions import alike

CONTRIB = "com.microsoft"
MOST_IN_GROUP = 512  # channels, of which GroupNorm's kernel takes an even number
MOST_IN_HEAD = 256  # channels, of which ONNX Runtime has flash attention
HEADS = (0, 2, 1, 3)  # (B, T, heads, D) <-> (B, heads, T, D)
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels, of four dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Heads:
    """Tokens, how many heads they are taken apart into, and the dtype that they are cast to on the way; 0 is none."""

    tokens: str
    heads: int
    dtype: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sum:
    """``x`` (B, C, H, W) + ``skip`` + ``bias`` (C,), the last "" for none; ``skip`` is like ``x``, or (B, C)."""

    x: str
    skip: str
    pixels: bool
    bias: str
    nodes: list[Node]


def for_cuda(path: Path, fusions: Sequence[Callable[[Graph], None]] = (), *, sums: bool = False) -> tuple[bytes, Path]:
    """The graph in the ONNX file ``path``, rewritten; it computes the same. And the folder that its weights lie in.

    ``fusions``, of :mod:`cuda_fusions`, are made first; with ``sums`` a group norm takes the sum before it along.

    Raises:
        BundleError: the file is not a readable protocol buffer.
    """
    folder, locations = _places(path)
    try:
        parts = list(fields(read_model(path)))
        graph = Graph(
            next(bytes(value) for number, _, value in parts if number == 7 and isinstance(value, memoryview)),
            locations,
        )
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not an ONNX file, or is cut off; export the bundle again") from error
    for fusion in fusions:
        fusion(graph)
    _Rewriting(graph, sums).all()
    kept = b"".join(field(number, value) for number, _, value in parts if number != 7)
    return kept + field(8, field(1, CONTRIB) + field(2, 1)) + field(7, graph.encoded()), folder


def _places(path: Path) -> tuple[Path, dict[str, str]]:
    """The folder where the weights of ``path`` really lie, and what each location is called from there.

    A graph in memory may read what lies in one folder, and links out of it, which a cache of the Hugging Face Hub is
    made of, are refused.
    """
    files = {location: (path.parent / location).resolve() for location in external_locations(path)}
    folder = Path(os.path.commonpath([file.parent for file in files.values()] or [path.parent.resolve()]))
    return folder, {location: file.relative_to(folder).as_posix() for location, file in files.items()}


class _Rewriting:
    def __init__(self, graph: Graph, sums: bool) -> None:
        self.graph, self.sums = graph, sums

    def all(self) -> None:
        """Replace what can be."""
        ways = {
            "GroupNormalization": self._group_norm,
            "Attention": self._attention,
            "Conv": self._convolution,
            "ArgMax": self._first_largest,
        }
        for op, rewrite in ways.items():
            for node in self.graph.of(op):
                found = rewrite(node)
                if found is not None:
                    made, replaced = found
                    self.graph.replace([node, *replaced], made)

    def _group_norm(self, node: Node) -> tuple[list[Node], list[Node]] | None:
        """What computes ``node``, and the nodes besides it that are not needed any more."""
        (x, scale, bias), (out,) = node.inputs, node.outputs
        weight, groups = self.graph.weight(scale), int(node.attributes["num_groups"])  # type: ignore[arg-type]
        if weight is None:
            return None
        epsilon = float(node.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]
        size = int(weight.shape[0]) // groups
        if size % 2 or size > MOST_IN_GROUP:
            return self._apart(node, weight.dtype, groups, epsilon), []
        activation = self._silu(out)
        if activation:
            out = activation[-1].outputs[0]
        how = {"epsilon": epsilon, "groups": groups, "activation": int(bool(activation)), "channels_last": 1}
        names = [f"{out}.{part}" for part in ("nhwc", "scale", "bias", "normalized", "skip", "sum")]
        sum_of = self._sum(x) if self.sums else None
        made = [
            Node(op="Transpose", inputs=(sum_of.x if sum_of else x,), outputs=(names[0],), attributes={"perm": LAST}),
            Node(op="Cast", inputs=(scale,), outputs=(names[1],), attributes={"to": FLOAT}),
            Node(op="Cast", inputs=(bias,), outputs=(names[2],), attributes={"to": FLOAT}),
            Node(op="Transpose", inputs=(names[3],), outputs=(out,), attributes={"perm": FIRST}),
        ]
        norm = Node(op="GroupNorm", domain=CONTRIB, inputs=tuple(names[:3]), outputs=(names[3],), attributes=how)
        if sum_of is None:
            return [*made, norm], activation
        inputs = (*norm.inputs, names[4] if sum_of.pixels else sum_of.skip, *([sum_of.bias] if sum_of.bias else ()))
        outputs = norm.outputs if self.graph.only_user(x) is node else (*norm.outputs, names[5])
        made.append(dataclasses.replace(norm, op="SkipGroupNorm", inputs=inputs, outputs=outputs))
        if sum_of.pixels:
            made.append(Node(op="Transpose", inputs=(sum_of.skip,), outputs=(names[4],), attributes={"perm": LAST}))
        if len(outputs) == 2:
            made.append(Node(op="Transpose", inputs=(names[5],), outputs=(x,), attributes={"perm": FIRST}))
        return made, [*activation, *sum_of.nodes]

    def _sum(self, name: str) -> _Sum | None:
        """What ``name`` is the sum of, if it is one that SkipGroupNorm computes along."""
        add = self.graph.producer(name, "Add")
        found = []
        for x, other in (add.inputs, add.inputs[::-1]) if add is not None else ():
            vector = self._of_each_channel(other)
            if vector is None and not alike(self.graph, x, other):
                continue
            convolution = self.graph.producer(x, "Conv")
            bias = convolution.inputs[2] if convolution is not None and len(convolution.inputs) == 3 else ""
            if self.graph.only_user(x) is not add or self.graph.weight(bias) is None:
                bias = ""
            nodes = [add] if add is not None else []
            found.append(_Sum(x=x, skip=vector or other, pixels=vector is None, bias=bias, nodes=nodes))
        if not found:
            return None
        best = max(found, key=lambda item: bool(item.bias))
        convolution = self.graph.producer(best.x, "Conv") if best.bias else None
        if convolution is not None:
            self.graph.replace(
                [convolution], [dataclasses.replace(convolution, inputs=convolution.inputs[:2], raw=b"")]
            )
        return best

    def _of_each_channel(self, name: str) -> str | None:
        """The (B, C) that ``name`` (B, C, 1, 1) is a view of."""
        for axis in (3, 2):
            node = self.graph.producer(name, "Unsqueeze")
            axes = None if node is None else self.graph.tensors.get(node.inputs[1])
            if node is None or axes is None or axes.values != (axis,):
                return None
            name = node.inputs[0]
        return name if len(self.graph.known(name).shape) == 2 else None

    def _apart(self, node: Node, dtype: int, groups: int, epsilon: float) -> list[Node]:
        """In parts, in float32: a group of an odd number of channels, which GroupNorm's kernel does not take."""
        (x, scale, bias), (out,) = node.inputs, node.outputs
        grouped = self.graph.constant(f"{out}.grouped_shape", INT64, [0, groups, -1])
        column = self.graph.constant(f"{out}.column_shape", INT64, [-1, 1, 1])
        axis = self.graph.constant(f"{out}.axis", INT64, [2])
        least = self.graph.constant(f"{out}.epsilon", FLOAT, [epsilon])
        made: list[Node] = []

        def add(op: str, *inputs: str, into: str = "", **attributes: int) -> str:
            name = into or f"{out}.{len(made)}"
            made.append(Node(op=op, inputs=inputs, outputs=(name,), attributes=attributes))
            return name

        whole = add("Cast", x, to=FLOAT)
        values = add("Reshape", whole, grouped)  # (B, groups, rest)
        centred = add("Sub", values, add("ReduceMean", values, axis))
        variance = add("ReduceMean", add("Mul", centred, centred), axis)
        normal = add("Div", centred, add("Sqrt", add("Add", variance, least)))
        normal = add("Reshape", normal, add("Shape", x))
        scaled = add("Mul", normal, add("Reshape", add("Cast", scale, to=FLOAT), column))
        shifted = add("Add", scaled, add("Reshape", add("Cast", bias, to=FLOAT), column))
        add("Cast", shifted, into=out, to=dtype)
        return made

    def _convolution(self, node: Node) -> tuple[list[Node], list[Node]] | None:
        (x, kernel, *bias), (out,) = node.inputs, node.outputs
        weight = self.graph.weight(kernel)
        if weight is None or len(weight.shape) != 4:
            return None
        names = [f"{out}.{part}" for part in ("nhwc", "kernel", "convolved")]
        return [
            Node(op="Transpose", inputs=(x,), outputs=(names[0],), attributes={"perm": LAST}),
            Node(op="Transpose", inputs=(kernel,), outputs=(names[1],), attributes={"perm": LAST}),
            dataclasses.replace(
                node, op="NhwcConv", domain=CONTRIB, inputs=(*names[:2], *bias), outputs=(names[2],), raw=b""
            ),
            Node(op="Transpose", inputs=(names[2],), outputs=(out,), attributes={"perm": FIRST}),
        ], []

    def _first_largest(self, node: Node) -> tuple[list[Node], list[Node]] | None:
        """Of integers, as CLIP looks for a text's end: in float32, as CUDA has no kernel for them.

        That kernel promises nothing of ties. ``x * N - place`` has none, and is largest at the first of the largest
        ``x``; exactly, since ids of tokens, under 50,000, times 77 of them are less than 2^24.
        """
        (x,), (out,) = node.inputs, node.outputs
        kind = self.graph.known(x)
        count = kind.last
        last = node.attributes.get("axis", 0) in (-1, len(kind.shape) - 1)
        if kind.dtype not in (INT32, INT64) or not count or not last or node.attributes.get("select_last_index"):
            return None
        factor = self.graph.constant(f"{out}.count", FLOAT, [count])
        places = self.graph.constant(f"{out}.places", FLOAT, list(range(count)))
        names = [f"{out}.{part}" for part in ("float", "scaled", "ranked")]
        return [
            Node(op="Cast", inputs=(x,), outputs=(names[0],), attributes={"to": FLOAT}),
            Node(op="Mul", inputs=(names[0], factor), outputs=(names[1],)),
            Node(op="Sub", inputs=(names[1], places), outputs=(names[2],)),
            dataclasses.replace(node, inputs=(names[2],), raw=b""),
        ], []

    def _silu(self, x: str) -> list[Node]:
        """The nodes of ``x * sigmoid(x)`` where ``x`` serves nothing else, the product last; else none."""
        users = sorted(self.graph.users(x), key=lambda node: node.op != "Sigmoid")
        if [node.op for node in users] != ["Sigmoid", "Mul"] or x in self.graph.outputs:
            return []
        sigmoid, product = users
        fits = self.graph.only_user(sigmoid.outputs[0]) is product and set(product.inputs) == {x, *sigmoid.outputs}
        return users if fits else []

    def _attention(self, node: Node) -> tuple[list[Node], list[Node]] | None:
        """In one node where heads are taken apart before it and put together after it, else in parts.

        Where it is in float32 among nodes in float16, casts may lie between all of these.
        """
        masks = ("is_causal", "softcap", "qk_matmul_output_mode")
        if len(node.inputs) != 3 or any(node.attributes.get(name) for name in masks):
            return None
        apart, together = [self._heads_apart(name) for name in node.inputs], self._heads_together(node.outputs[0])
        query = self.graph.known(node.inputs[0])  # (B, heads, T, D)
        size = query.last
        heads = {found.heads for found in apart if found is not None}
        fits = None not in apart and together is not None and len(heads) == 1
        if size and (not fits or (query.dtype == FLOAT16 and size > MOST_IN_HEAD)):
            return self._attention_in_parts(node, query.dtype, size), []
        if not fits or together is None:
            return None
        how: dict[str, int | float] = {"num_heads": heads.pop()}
        if scale := float(node.attributes.get("scale", 0.0)):  # type: ignore[arg-type]
            how["scale"] = scale
        out, made, inputs = node.outputs[0], list[Node](), list[str]()
        for found in filter(None, apart):
            inputs.append(self._cast(found.tokens, found.dtype, f"{out}.{len(inputs)}", made))
        final = together[-1].outputs[0]
        casts = [int(after.attributes["to"]) for after in together if after.op == "Cast"]  # type: ignore[arg-type]
        attended = f"{out}.tokens" if casts else final
        made.append(
            Node(op="MultiHeadAttention", domain=CONTRIB, inputs=tuple(inputs), outputs=(attended,), attributes=how)
        )
        if casts:
            made.append(Node(op="Cast", inputs=(attended,), outputs=(final,), attributes={"to": casts[-1]}))
        return made, together

    def _attention_in_parts(self, node: Node, dtype: int, size: int) -> list[Node]:
        (q, k, v), (out,) = node.inputs, node.outputs
        factor = float(node.attributes.get("scale", 0.0)) or size**-0.5  # type: ignore[arg-type]
        scale = self.graph.constant(f"{out}.scale", dtype, [factor])
        names = [f"{out}.{part}" for part in ("scaled", "turned", "logits", "weights")]
        return [
            Node(op="Mul", inputs=(q, scale), outputs=(names[0],)),  # before the product, which then overflows less
            Node(op="Transpose", inputs=(k,), outputs=(names[1],), attributes={"perm": (0, 1, 3, 2)}),
            Node(op="MatMul", inputs=(names[0], names[1]), outputs=(names[2],)),
            Node(op="Softmax", inputs=(names[2],), outputs=(names[3],), attributes={"axis": -1}),
            Node(op="MatMul", inputs=(names[3], v), outputs=(out,)),
        ]

    def _heads_apart(self, name: str) -> _Heads | None:
        """The tokens (B, T, heads * D) that ``name`` (B, heads, T, D) is a view of."""
        transpose, dtype = self._source(name)
        if transpose is None or transpose.op != "Transpose" or transpose.attributes.get("perm") != HEADS:
            return None
        reshape, earlier = self._source(transpose.inputs[0])
        shape = None if reshape is None or reshape.op != "Reshape" else self.graph.producer(reshape.inputs[1])
        if reshape is None or shape is None or shape.op != "Concat" or len(shape.inputs) != 4:
            return None
        heads = self.graph.tensors.get(shape.inputs[2])
        if heads is None or len(heads.values) != 1:
            return None
        return _Heads(tokens=reshape.inputs[0], heads=heads.values[0], dtype=dtype or earlier)

    def _heads_together(self, name: str) -> list[Node] | None:
        """The nodes, casts among them, after which ``name`` is tokens again, where it serves nothing else."""
        found: list[Node] = []
        for wanted in ("Transpose", "Reshape"):
            for op in ("Cast", wanted):
                user = self.graph.only_user(name)
                if user is None or user.op not in (op, wanted):
                    return None
                if user.op == op:
                    found.append(user)
                    name = user.outputs[0]
        transpose, reshape = (node for node in found if node.op != "Cast")
        shape = self.graph.producer(reshape.inputs[1]) if transpose.attributes.get("perm") == HEADS else None
        return None if shape is None or shape.op != "Concat" or len(shape.inputs) != 3 else found

    def _source(self, name: str) -> tuple[Node | None, int]:
        """What makes ``name``; where that is a cast, what makes its input, and the dtype after it, else 0."""
        node = self.graph.producer(name)
        if node is None or node.op != "Cast":
            return node, 0
        return self.graph.producer(node.inputs[0]), int(node.attributes["to"])  # type: ignore[arg-type]

    def _cast(self, name: str, dtype: int, into: str, made: list[Node]) -> str:
        """``name`` in ``dtype``; itself where that is 0."""
        if not dtype:
            return name
        made.append(Node(op="Cast", inputs=(name,), outputs=(into,), attributes={"to": dtype}))
        return into
