"""An ONNX graph as nodes that can be replaced, read from its file's bytes and written to bytes, weights left alone.

The runtime has no onnx package, and needs few of its fields (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calotype.runtime.graphs.protobuf import field, fields

Attribute = int | float | str | tuple[int, ...]
Attributes = Mapping[str, Attribute]
EMPTY = memoryview(b"")
FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10
DTYPES = {FLOAT: np.float32, INT64: np.int64, FLOAT16: np.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """``raw`` is the node as it stood in the file; empty for one that is made here."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes = dataclasses.field(default_factory=dict)
    domain: str = ""
    raw: bytes = b""

    def encoded(self) -> bytes:
        """A NodeProto."""
        if self.raw:
            return self.raw
        parts = [field(1, name) for name in self.inputs] + [field(2, name) for name in self.outputs]
        parts += [field(3, self.outputs[0]), field(4, self.op), field(7, self.domain)]
        return b"".join(parts) + b"".join(field(5, _attribute(*item)) for item in self.attributes.items())

    def number(self, name: str, default: float = 0) -> float:
        """An attribute that is one."""
        return self.attributes.get(name, default)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An initializer, or what is known of a value: its shape, a dimension that is not a number by its name or "".

    ``values`` are those of an initializer of 64-bit integers that stands in the graph.
    """

    dtype: int = 0
    shape: tuple[int | str, ...] = ()
    values: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The last dimension; 0 where it is not known."""
        size = self.shape[-1] if self.shape else 0
        return size if isinstance(size, int) else 0


class Graph:
    """A GraphProto whose nodes can be replaced."""

    def __init__(self, message: bytes, locations: Mapping[str, str]) -> None:
        """``locations`` names the files of weights as the written graph is to have them."""
        self.tensors = dict[str, Tensor]()
        self._rest, self._types, self.outputs = b"", dict[str, memoryview](), set[str]()
        self._nodes = dict[int, Node]()  # by the place in the file; those that are made follow
        self._places = dict[int, tuple[int, int]]()  # by identity: of what it stands for, and its own
        self._next = 0
        self._producers, self._users = dict[str, Node](), dict[str, list[Node]]()
        for number, _, value in fields(memoryview(message)):
            if number == 1 and isinstance(value, memoryview):
                self._add(_read_node(bytes(value)))
                continue
            if number == 5 and isinstance(value, memoryview):
                name, tensor = _read_tensor(bytes(value))
                self.tensors[name] = tensor
                value = memoryview(_moved(value, locations))
            self._rest += field(number, value)
            if number in (11, 12, 13) and isinstance(value, memoryview):  # inputs, outputs and what lies between
                described = _once(value)
                self._types[_text(described[1])] = described.get(2, EMPTY)
            if number == 12 and isinstance(value, memoryview):
                self.outputs |= {_text(part) for where, _, part in fields(value) if where == 1}

    def of(self, op: str) -> Iterator[Node]:
        """The nodes of ONNX's own operator ``op``; those that are replaced on the way are passed over."""
        for place, node in list(self._nodes.items()):
            if node.op == op and not node.domain and place in self._nodes:
                yield node

    def producer(self, name: str, op: str = "") -> Node | None:
        """The node that makes ``name``, if it is an ``op``."""
        node = self._producers.get(name)
        return node if node is not None and op in ("", node.op) else None

    def users(self, name: str) -> Sequence[Node]:
        """The nodes that take ``name``; one that takes it twice comes twice."""
        return self._users.get(name, ())

    def only_user(self, name: str, op: str = "") -> Node | None:
        """The node that takes ``name``, where it serves nothing else, if it is an ``op``."""
        users = self.users(name)
        return users[0] if len(users) == 1 and name not in self.outputs and op in ("", users[0].op) else None

    def known(self, name: str) -> Tensor:
        """What the file says of a value that is no initializer."""
        return _read_type(self._types.get(name, EMPTY))

    def weight(self, name: str) -> Tensor | None:
        """The initializer that ``name`` is, or is cast from; in the dtype after that."""
        cast = self.producer(name)
        if cast is None:
            return self.tensors.get(name)
        tensor = self.tensors.get(cast.inputs[0]) if cast.op == "Cast" else None
        return None if tensor is None else dataclasses.replace(tensor, dtype=int(cast.number("to")))

    def constant(self, name: str, dtype: int, values: Sequence[float]) -> str:
        """A new initializer, of one dimension."""
        data = np.array(values, DTYPES[dtype]).tobytes()
        self._rest += field(5, field(1, len(values)) + field(2, dtype) + field(8, name) + field(9, data))
        whole = tuple(int(value) for value in values) if dtype == INT64 else ()
        self.tensors[name] = Tensor(dtype=dtype, shape=(len(values),), values=whole)
        return name

    def replace(self, gone: Sequence[Node], made: Sequence[Node]) -> None:
        """Put ``made`` where the first of ``gone`` was, or where its inputs are, if they come later."""
        first = min(self._places[id(node)] for node in gone)[0]
        for node in gone:
            del self._nodes[self._places.pop(id(node))[1]]
            for name in node.outputs:
                self._producers.pop(name, None)
            for name in node.inputs:
                self._users[name].remove(node)
        for node in made:
            self._add(node, first)

    def encoded(self) -> bytes:
        """A GraphProto, its nodes in an order in which each follows those it takes from."""
        return b"".join(field(1, node.encoded()) for node in self._in_order()) + self._rest

    def _add(self, node: Node, instead_of: int | None = None) -> None:
        place = self._next
        self._next += 1
        self._nodes[place], self._places[id(node)] = node, (place if instead_of is None else instead_of, place)
        self._producers |= dict.fromkeys(filter(None, node.outputs), node)
        for name in node.inputs:
            self._users.setdefault(name, []).append(node)

    def _in_order(self) -> Iterator[Node]:
        """As they stood, as far as that is such an order."""
        missing = {id(node): sum(name in self._producers for name in node.inputs) for node in self._nodes.values()}
        ready = [(self._places[id(node)], node) for node in self._nodes.values() if not missing[id(node)]]
        heapq.heapify(ready)
        while ready:
            _, node = heapq.heappop(ready)
            yield node
            for user in (user for name in filter(None, node.outputs) for user in self._users.get(name, ())):
                missing[id(user)] -= 1
                if not missing[id(user)]:
                    heapq.heappush(ready, (self._places[id(user)], user))


def _text(value: int | memoryview) -> str:
    return "" if isinstance(value, int) else bytes(value).decode()


def _read_node(message: bytes) -> Node:
    names: dict[int, list[str]] = {number: [] for number in (1, 2, 4, 7)}
    attributes: dict[str, Attribute] = {}
    for number, _, value in fields(memoryview(message)):
        if number in names and isinstance(value, memoryview):
            names[number].append(bytes(value).decode())
        elif number == 5 and isinstance(value, memoryview):
            attributes |= _read_attribute(value)
    return Node(
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


def _read_tensor(message: bytes) -> tuple[str, Tensor]:
    name, dtype, shape, values = "", 0, list[int | str](), list[int]()
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
    return name, Tensor(dtype=dtype, shape=tuple(shape), values=tuple(values))


def _read_type(message: memoryview) -> Tensor:
    """Of a value between the nodes; a dimension is a number, a name, or nothing, "" here."""
    tensor = _once(_once(message).get(1, EMPTY))
    dimensions = [_once(dimension) for _, _, dimension in fields(tensor.get(2, EMPTY))]  # type: ignore[arg-type]
    shape = tuple(int(item[1]) if 1 in item else _text(item.get(2, EMPTY)) for item in dimensions)
    return Tensor(dtype=int(tensor.get(1, 0)), shape=shape)


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
