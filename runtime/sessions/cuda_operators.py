"""A graph in the operators that ONNX Runtime has CUDA kernels for, made in memory when a session opens.

ONNX Runtime 1.31 has no CUDA kernel for ``GroupNormalization``: it takes the operator apart, into some fifteen nodes.
Its own ``GroupNorm`` (com.microsoft) takes the activation along and has channels last, as its ``NhwcConv`` and tensor
cores do; its sums are atomic additions, so that an image's last bits may differ from one run to the next.
``MultiHeadAttention`` (com.microsoft) takes tokens as matrix products leave them, which saves ``Attention`` four
transposes. The provider's option ``prefer_nhwc`` does less, and puts the arithmetic of shapes on the GPU, with copies
that no CUDA graph can hold. The operators are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from calotype.runtime.errors import BundleError
from calotype.runtime.onnx_files import external_locations
from calotype.runtime.protobuf import field, fields

Attribute = int | float | str | tuple[int, ...]
Attributes = Mapping[str, Attribute]
CONTRIB = "com.microsoft"
FLOAT, INT64 = 1, 7
DTYPES = {FLOAT: np.float32, INT64: np.int64, 10: np.float16}
MOST_IN_GROUP = 512  # channels, of which GroupNorm's kernel takes an even number
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
            if number == 12 and isinstance(value, memoryview):
                self._outputs |= {_text(part) for where, _, part in fields(value) if where == 1}
        self._producers = {name: node for node in self._nodes for name in node.outputs}
        self._uses = Counter(name for node in self._nodes for name in node.inputs)
        self._uses.update(self._outputs)
        self._users = {name: node for node in self._nodes for name in node.inputs}  # the last of several

    def rewritten(self) -> bytes:
        """The graph, encoded."""
        ways = {"GroupNormalization": self._group_norm, "Attention": self._attention, "Conv": self._convolution}
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

    def _silu(self, x: str) -> list[_Node]:
        """The nodes of ``x * sigmoid(x)`` where ``x`` serves nothing else, the product last; else none."""
        users = [node for node in self._nodes if x in node.inputs]
        if len(users) != 2 or self._uses[x] != 2:
            return []
        sigmoid, product = users
        fits = (sigmoid.op, product.op) == ("Sigmoid", "Mul") and set(product.inputs) == {x, *sigmoid.outputs}
        return users if fits and self._uses[sigmoid.outputs[0]] == 1 else []

    def _attention(self, node: _Node) -> tuple[list[_Node], list[_Node]] | None:
        """Where heads are taken apart before it and put together after it, and nothing is masked."""
        plain = not any(node.attributes.get(name) for name in ("is_causal", "softcap", "qk_matmul_output_mode"))
        apart = [self._heads_apart(name) for name in node.inputs]
        together = self._heads_together(node.outputs[0])
        heads = {count for _, count in filter(None, apart)}
        if not plain or len(apart) != 3 or None in apart or together is None or len(heads) != 1:
            return None
        how: dict[str, int | float] = {"num_heads": heads.pop()}
        if scale := float(node.attributes.get("scale", 0.0)):  # type: ignore[arg-type]
            how["scale"] = scale
        made = _Node(
            op="MultiHeadAttention",
            domain=CONTRIB,
            inputs=tuple(name for name, _ in filter(None, apart)),
            outputs=together[-1].outputs,
            attributes=how,
        )
        return [made], together

    def _heads_apart(self, name: str) -> tuple[str, int] | None:
        """The tokens (B, T, heads * D) that ``name`` (B, heads, T, D) is a view of, and how many heads."""
        transpose = self._producers.get(name)
        if transpose is None or transpose.op != "Transpose" or transpose.attributes.get("perm") != HEADS:
            return None
        reshape = self._producers.get(transpose.inputs[0])
        shape = None if reshape is None or reshape.op != "Reshape" else self._producers.get(reshape.inputs[1])
        if reshape is None or shape is None or shape.op != "Concat" or len(shape.inputs) != 4:
            return None
        heads = self._tensors.get(shape.inputs[2])
        return None if heads is None or len(heads.values) != 1 else (reshape.inputs[0], heads.values[0])

    def _heads_together(self, name: str) -> list[_Node] | None:
        """The transpose and the reshape after which ``name`` is tokens again, where it serves nothing else."""
        transpose = self._users.get(name)
        reshape = None if transpose is None else self._users.get(transpose.outputs[0])
        if transpose is None or reshape is None or self._uses[name] != 1 or self._uses[transpose.outputs[0]] != 1:
            return None
        fits = (transpose.op, reshape.op) == ("Transpose", "Reshape") and transpose.attributes.get("perm") == HEADS
        shape = self._producers.get(reshape.inputs[1]) if fits else None
        return None if shape is None or shape.op != "Concat" or len(shape.inputs) != 3 else [transpose, reshape]

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
            one = value
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
