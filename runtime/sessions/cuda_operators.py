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
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calotype.runtime.errors import BundleError
from calotype.runtime.onnx_files import external_locations
from calotype.runtime.protobuf import field, fields

Attribute = int | float | str | tuple[int, ...]
Attributes = Mapping[str, Attribute]
EMPTY = memoryview(b"")
CONTRIB = "com.microsoft"
FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10
DTYPES = {FLOAT: np.float32, INT64: np.int64, FLOAT16: np.float16}
MOST_IN_GROUP = 512  # channels, of which GroupNorm's kernel takes an even number
MOST_IN_HEAD = 256  # channels, of which ONNX Runtime has flash attention
HEADS = (0, 2, 1, 3)  # (B, T, heads, D) <-> (B, heads, T, D)
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Node:
    """``raw`` is the node as it stood in the file; empty for one that is made here."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes = dataclasses.field(default_factory=dict)
    domain: str = ""
    raw: bytes = b""

    def encoded(self) -> bytes:
        if self.raw:
            return self.raw
        parts = [field(1, name) for name in self.inputs] + [field(2, name) for name in self.outputs]
        parts += [field(3, self.outputs[0]), field(4, self.op), field(7, self.domain)]
        return b"".join(parts) + b"".join(field(5, _attribute(*item)) for item in self.attributes.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """An initializer: its shape, and its values where they are 64-bit integers that stand in the graph."""

    dtype: int
    shape: tuple[int, ...]
    values: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Heads:
    """Tokens, how many heads they are taken apart into, and the dtype that they are cast to on the way; 0 is none."""

    tokens: str
    heads: int
    dtype: int


def for_cuda(path: Path) -> tuple[bytes, Path]:
    """The graph in the ONNX file ``path``, rewritten; it computes the same. And the folder that its weights lie in.

    Raises:
        BundleError: the file is not a readable protocol buffer.
    """
    folder, locations = _places(path)
    try:
        parts = list(fields(memoryview(path.read_bytes())))
        graph = _Graph(
            next(bytes(value) for number, _, value in parts if number == 7 and isinstance(value, memoryview)),
            locations,
        )
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not an ONNX file, or is cut off; export the bundle again") from error
    kept = b"".join(field(number, value) for number, _, value in parts if number != 7)
    return kept + field(8, field(1, CONTRIB) + field(2, 1)) + field(7, graph.rewritten()), folder


def _places(path: Path) -> tuple[Path, dict[str, str]]:
    """The folder where the weights of ``path`` really lie, and what each location is called from there.

    A graph in memory may read what lies in one folder, and links out of it, which a cache of the Hugging Face Hub is
    made of, are refused.
    """
    files = {location: (path.parent / location).resolve() for location in external_locations(path)}
    folder = Path(os.path.commonpath([file.parent for file in files.values()] or [path.parent.resolve()]))
    return folder, {location: file.relative_to(folder).as_posix() for location, file in files.items()}


class _Graph:
    def __init__(self, message: bytes, locations: Mapping[str, str]) -> None:
        self._rest, self._nodes, self._tensors = b"", list[_Node](), dict[str, _Tensor]()
        self._types = dict[str, memoryview]()  # of values between the nodes
        self._outputs: set[str] = set()
        self._added: list[bytes] = []
        for number, _, value in fields(memoryview(message)):
            if number == 1 and isinstance(value, memoryview):
                self._nodes.append(_read_node(bytes(value)))
                continue
            if number == 5 and isinstance(value, memoryview):
                name, tensor = _read_tensor(bytes(value))
                self._tensors[name] = tensor
                value = memoryview(_moved(value, locations))
            self._rest += field(number, value)
            if number == 13 and isinstance(value, memoryview):
                described = _once(value)
                self._types[_text(described[1])] = described.get(2, EMPTY)
            if number == 12 and isinstance(value, memoryview):
                self._outputs |= {_text(part) for where, _, part in fields(value) if where == 1}
        self._producers = {name: node for node in self._nodes for name in node.outputs}
        self._uses = Counter(name for node in self._nodes for name in node.inputs)
        self._uses.update(self._outputs)
        self._users = {name: node for node in self._nodes for name in node.inputs}  # the last of several

    def rewritten(self) -> bytes:
        """The graph, encoded."""
        ways = {
            "GroupNormalization": self._group_norm,
            "Attention": self._attention,
            "Conv": self._convolution,
            "ArgMax": self._first_largest,
        }
        places = {id(node): place for place, node in enumerate(self._nodes)}
        gone: set[int] = set()
        instead: dict[int, list[_Node]] = {}
        for node in self._nodes:
            rewrite = ways.get(node.op) if not node.domain else None
            found = rewrite(node) if rewrite is not None else None
            if found is not None:
                made, replaced = found
                instead[places[id(node)]] = made
                gone |= {places[id(other)] for other in (node, *replaced)}
        nodes = []
        for place, node in enumerate(self._nodes):
            nodes += instead.get(place, [])
            if place not in gone:
                nodes.append(node)
        return b"".join(field(1, node.encoded()) for node in nodes) + self._rest + b"".join(self._added)

    def _group_norm(self, node: _Node) -> tuple[list[_Node], list[_Node]] | None:
        """What computes ``node``, and the nodes besides it that are not needed any more."""
        (x, scale, bias), (out,) = node.inputs, node.outputs
        weight, groups = self._weight(scale), int(node.attributes["num_groups"])  # type: ignore[arg-type]
        if weight is None:
            return None
        epsilon = float(node.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]
        size = weight.shape[0] // groups
        if size % 2 or size > MOST_IN_GROUP:
            return self._apart(node, weight.dtype, groups, epsilon), []
        activation = self._silu(out)
        if activation:
            out = activation[-1].outputs[0]
        how = {"epsilon": epsilon, "groups": groups, "activation": int(bool(activation)), "channels_last": 1}
        names = [f"{out}.{part}" for part in ("nhwc", "scale", "bias", "normalized")]
        return [
            _Node(op="Transpose", inputs=(x,), outputs=(names[0],), attributes={"perm": LAST}),
            _Node(op="Cast", inputs=(scale,), outputs=(names[1],), attributes={"to": FLOAT}),
            _Node(op="Cast", inputs=(bias,), outputs=(names[2],), attributes={"to": FLOAT}),
            _Node(op="GroupNorm", domain=CONTRIB, inputs=tuple(names[:3]), outputs=(names[3],), attributes=how),
            _Node(op="Transpose", inputs=(names[3],), outputs=(out,), attributes={"perm": FIRST}),
        ], activation

    def _apart(self, node: _Node, dtype: int, groups: int, epsilon: float) -> list[_Node]:
        """In parts, in float32: a group of an odd number of channels, which GroupNorm's kernel does not take."""
        (x, scale, bias), (out,) = node.inputs, node.outputs
        grouped = self._constant(f"{out}.grouped_shape", INT64, [0, groups, -1])
        column = self._constant(f"{out}.column_shape", INT64, [-1, 1, 1])
        axis = self._constant(f"{out}.axis", INT64, [2])
        least = self._constant(f"{out}.epsilon", FLOAT, [epsilon])
        made: list[_Node] = []

        def add(op: str, *inputs: str, into: str = "", **attributes: int) -> str:
            name = into or f"{out}.{len(made)}"
            made.append(_Node(op=op, inputs=inputs, outputs=(name,), attributes=attributes))
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

    def _convolution(self, node: _Node) -> tuple[list[_Node], list[_Node]] | None:
        (x, kernel, *bias), (out,) = node.inputs, node.outputs
        weight = self._weight(kernel)
        if weight is None or len(weight.shape) != 4:
            return None
        names = [f"{out}.{part}" for part in ("nhwc", "kernel", "convolved")]
        return [
            _Node(op="Transpose", inputs=(x,), outputs=(names[0],), attributes={"perm": LAST}),
            _Node(op="Transpose", inputs=(kernel,), outputs=(names[1],), attributes={"perm": LAST}),
            dataclasses.replace(
                node, op="NhwcConv", domain=CONTRIB, inputs=(*names[:2], *bias), outputs=(names[2],), raw=b""
            ),
            _Node(op="Transpose", inputs=(names[2],), outputs=(out,), attributes={"perm": FIRST}),
        ], []

    def _first_largest(self, node: _Node) -> tuple[list[_Node], list[_Node]] | None:
        """Of integers, as CLIP looks for a text's end: in float32, as CUDA has no kernel for them.

        That kernel promises nothing of ties. ``x * N - place`` has none, and is largest at the first of the largest
        ``x``; exactly, since ids of tokens, under 50,000, times 77 of them are less than 2^24.
        """
        (x,), (out,) = node.inputs, node.outputs
        kind = _read_type(self._types.get(x, EMPTY))
        count = kind.shape[-1] if kind.shape else 0
        last = node.attributes.get("axis", 0) in (-1, len(kind.shape) - 1)
        if kind.dtype not in (INT32, INT64) or not count or not last or node.attributes.get("select_last_index"):
            return None
        factor = self._constant(f"{out}.count", FLOAT, [count])
        places = self._constant(f"{out}.places", FLOAT, list(range(count)))
        names = [f"{out}.{part}" for part in ("float", "scaled", "ranked")]
        return [
            _Node(op="Cast", inputs=(x,), outputs=(names[0],), attributes={"to": FLOAT}),
            _Node(op="Mul", inputs=(names[0], factor), outputs=(names[1],)),
            _Node(op="Sub", inputs=(names[1], places), outputs=(names[2],)),
            dataclasses.replace(node, inputs=(names[2],), raw=b""),
        ], []

    def _silu(self, x: str) -> list[_Node]:
        """The nodes of ``x * sigmoid(x)`` where ``x`` serves nothing else, the product last; else none."""
        users = [node for node in self._nodes if x in node.inputs]
        if len(users) != 2 or self._uses[x] != 2:
            return []
        sigmoid, product = users
        fits = (sigmoid.op, product.op) == ("Sigmoid", "Mul") and set(product.inputs) == {x, *sigmoid.outputs}
        return users if fits and self._uses[sigmoid.outputs[0]] == 1 else []

    def _attention(self, node: _Node) -> tuple[list[_Node], list[_Node]] | None:
        """In one node where heads are taken apart before it and put together after it, else in parts.

        Where it is in float32 among nodes in float16, casts may lie between all of these.
        """
        masks = ("is_causal", "softcap", "qk_matmul_output_mode")
        if len(node.inputs) != 3 or any(node.attributes.get(name) for name in masks):
            return None
        apart, together = [self._heads_apart(name) for name in node.inputs], self._heads_together(node.outputs[0])
        query = _read_type(self._types.get(node.inputs[0], EMPTY))  # (B, heads, T, D)
        size = query.shape[-1] if query.shape else 0
        heads = {found.heads for found in apart if found is not None}
        fits = None not in apart and together is not None and len(heads) == 1
        if size and (not fits or (query.dtype == FLOAT16 and size > MOST_IN_HEAD)):
            return self._attention_in_parts(node, query.dtype, size), []
        if not fits or together is None:
            return None
        how: dict[str, int | float] = {"num_heads": heads.pop()}
        if scale := float(node.attributes.get("scale", 0.0)):  # type: ignore[arg-type]
            how["scale"] = scale
        out, made, inputs = node.outputs[0], list[_Node](), list[str]()
        for found in filter(None, apart):
            inputs.append(self._cast(found.tokens, found.dtype, f"{out}.{len(inputs)}", made))
        final = together[-1].outputs[0]
        casts = [int(after.attributes["to"]) for after in together if after.op == "Cast"]  # type: ignore[arg-type]
        attended = f"{out}.tokens" if casts else final
        made.append(
            _Node(op="MultiHeadAttention", domain=CONTRIB, inputs=tuple(inputs), outputs=(attended,), attributes=how)
        )
        if casts:
            made.append(_Node(op="Cast", inputs=(attended,), outputs=(final,), attributes={"to": casts[-1]}))
        return made, together

    def _attention_in_parts(self, node: _Node, dtype: int, size: int) -> list[_Node]:
        (q, k, v), (out,) = node.inputs, node.outputs
        factor = float(node.attributes.get("scale", 0.0)) or size**-0.5  # type: ignore[arg-type]
        scale = self._constant(f"{out}.scale", dtype, [factor])
        names = [f"{out}.{part}" for part in ("scaled", "turned", "logits", "weights")]
        return [
            _Node(op="Mul", inputs=(q, scale), outputs=(names[0],)),  # before the product, which then overflows less
            _Node(op="Transpose", inputs=(k,), outputs=(names[1],), attributes={"perm": (0, 1, 3, 2)}),
            _Node(op="MatMul", inputs=(names[0], names[1]), outputs=(names[2],)),
            _Node(op="Softmax", inputs=(names[2],), outputs=(names[3],), attributes={"axis": -1}),
            _Node(op="MatMul", inputs=(names[3], v), outputs=(out,)),
        ]

    def _heads_apart(self, name: str) -> _Heads | None:
        """The tokens (B, T, heads * D) that ``name`` (B, heads, T, D) is a view of."""
        transpose, dtype = self._source(name)
        if transpose is None or transpose.op != "Transpose" or transpose.attributes.get("perm") != HEADS:
            return None
        reshape, earlier = self._source(transpose.inputs[0])
        shape = None if reshape is None or reshape.op != "Reshape" else self._producers.get(reshape.inputs[1])
        if reshape is None or shape is None or shape.op != "Concat" or len(shape.inputs) != 4:
            return None
        heads = self._tensors.get(shape.inputs[2])
        if heads is None or len(heads.values) != 1:
            return None
        return _Heads(tokens=reshape.inputs[0], heads=heads.values[0], dtype=dtype or earlier)

    def _heads_together(self, name: str) -> list[_Node] | None:
        """The nodes, casts among them, after which ``name`` is tokens again, where it serves nothing else."""
        found: list[_Node] = []
        for wanted in ("Transpose", "Reshape"):
            for op in ("Cast", wanted):
                user = self._users.get(name)
                if user is None or self._uses[name] != 1 or user.op not in (op, wanted):
                    return None
                if user.op == op:
                    found.append(user)
                    name = user.outputs[0]
        transpose, reshape = (node for node in found if node.op != "Cast")
        shape = self._producers.get(reshape.inputs[1]) if transpose.attributes.get("perm") == HEADS else None
        return None if shape is None or shape.op != "Concat" or len(shape.inputs) != 3 else found

    def _source(self, name: str) -> tuple[_Node | None, int]:
        """What makes ``name``; where that is a cast, what makes its input, and the dtype after it, else 0."""
        node = self._producers.get(name)
        if node is None or node.op != "Cast":
            return node, 0
        return self._producers.get(node.inputs[0]), int(node.attributes["to"])  # type: ignore[arg-type]

    def _cast(self, name: str, dtype: int, into: str, made: list[_Node]) -> str:
        """``name`` in ``dtype``; itself where that is 0."""
        if not dtype:
            return name
        made.append(_Node(op="Cast", inputs=(name,), outputs=(into,), attributes={"to": dtype}))
        return into

    def _weight(self, name: str) -> _Tensor | None:
        """The initializer that ``name`` is, or is cast from; in the dtype after that."""
        cast = self._producers.get(name)
        if cast is None:
            return self._tensors.get(name)
        tensor = self._tensors.get(cast.inputs[0]) if cast.op == "Cast" else None
        return None if tensor is None else dataclasses.replace(tensor, dtype=int(cast.attributes["to"]))  # type: ignore[arg-type]

    def _constant(self, name: str, dtype: int, values: list[float]) -> str:
        data = np.array(values, DTYPES[dtype]).tobytes()
        self._added.append(field(5, field(1, len(values)) + field(2, dtype) + field(8, name) + field(9, data)))
        return name


def _text(value: int | memoryview) -> str:
    return "" if isinstance(value, int) else bytes(value).decode()


def _read_node(message: bytes) -> _Node:
    names: dict[int, list[str]] = {number: [] for number in (1, 2, 4, 7)}
    attributes: dict[str, Attribute] = {}
    for number, _, value in fields(memoryview(message)):
        if number in names and isinstance(value, memoryview):
            names[number].append(bytes(value).decode())
        elif number == 5 and isinstance(value, memoryview):
            attributes |= _read_attribute(value)
    return _Node(
        op="".join(names[4]),
        inputs=tuple(names[1]),
        outputs=tuple(names[2]),
        attributes=attributes,
        domain="".join(names[7]),
        raw=message,
    )


def _read_attribute(message: memoryview) -> dict[str, Attribute]:
    """Its name and value; an empty dictionary where that is neither a number, nor numbers, nor text."""
    name, several = "", list[int]()
    one: Attribute | None = None
    for number, _, value in fields(message):
        if number == 1 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == 2 and isinstance(value, memoryview):
            one = float(np.frombuffer(value, "<f4")[0])
        elif number == 3 and isinstance(value, int):
            one = value - (value >> 63 << 64)  # signed
        elif number == 4 and isinstance(value, memoryview):
            one = bytes(value).decode(errors="replace")
        elif number == 8:
            several += _integers(value)
    if several:
        return {name: tuple(several)}
    return {} if one is None else {name: one}


def _read_tensor(message: bytes) -> tuple[str, _Tensor]:
    name, dtype, shape, values = "", 0, list[int](), list[int]()
    for number, _, value in fields(memoryview(message)):
        if number == 1:
            shape += _integers(value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 7:
            values += _integers(value)
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == 9 and isinstance(value, memoryview) and dtype == INT64:
            values += np.frombuffer(value, "<i8").tolist()
    return name, _Tensor(dtype=dtype, shape=tuple(shape), values=tuple(values))


def _read_type(message: memoryview) -> _Tensor:
    """Of a value between the nodes; a dimension that is not known is 0."""
    tensor = _once(_once(message).get(1, EMPTY))
    shape = tuple(int(_once(dimension).get(1, 0)) for _, _, dimension in fields(tensor.get(2, EMPTY)))  # type: ignore[arg-type]
    return _Tensor(dtype=int(tensor.get(1, 0)), shape=shape)


def _once(message: memoryview) -> dict[int, Any]:
    """The fields of a message that has none twice."""
    return {number: value for number, _, value in fields(message)}


def _moved(tensor: memoryview, locations: Mapping[str, str]) -> bytes:
    """An initializer whose values lie in another file, as that is named in ``locations``; any other as it is."""
    parts = list(fields(tensor))
    if not any(number == 13 for number, _, _ in parts):
        return bytes(tensor)
    moved = b""
    for number, _, value in parts:
        if number == 13 and isinstance(value, memoryview):
            entry = {key: _text(text) for key, _, text in fields(value)}
            if entry.get(1) == "location":
                value = memoryview(field(1, "location") + field(2, locations[entry.get(2, "")]))
        moved += field(number, value)
    return moved


def _integers(value: int | memoryview) -> Iterator[int]:
    """Of a repeated field: one a field, or packed into one."""
    if isinstance(value, int):
        yield value
        return
    # Packed ones are what a field looks like without its tag.
    position = 0
    while position < len(value):
        stop = position
        while value[stop] > 0x7F:
            stop += 1
        yield sum((byte & 0x7F) << 7 * place for place, byte in enumerate(value[position : stop + 1]))
        position = stop + 1


def _attribute(name: str, value: Attribute) -> bytes:
    """The last field says of which kind it is."""
    match value:
        case tuple():
            return field(1, name) + b"".join(field(8, item) for item in value) + field(20, 7)
        case float():
            return field(1, name) + field(2, value) + field(20, 1)
        case str():
            return field(1, name) + field(4, value) + field(20, 3)
        case int():
            return field(1, name) + field(3, value) + field(20, 2)
    raise AssertionError(value)
