"""What an ONNX file reads from other files, and what goes into it and comes out, without the onnx package.

The field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.protobuf import Value, fields
from calotype.runtime.untrusted import read_bytes, why

MOST_BYTES = 2**31 - 1  # of a protocol buffer
# Message -> field number -> message found there. Only the ways that lead to a tensor are followed, and all of those:
# a test derives them from the onnx package.
WAYS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
DTYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16"}
# A dtype, "" where it is none of ours, and a shape, in which None is a dimension that is no number.
Described = tuple[str, tuple[int | None, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFile:
    """What an ONNX file says of itself: every ``location`` of external data, and its inputs and outputs by name."""

    locations: frozenset[str]
    inputs: Mapping[str, Described]
    outputs: Mapping[str, Described]


def read_graph(path: Path) -> GraphFile:
    """Read an ONNX file, nothing that lies outside of it.

    Raises:
        BundleError: when it is not a readable protocol buffer, or one that readers understand differently.
    """
    model = read_model(path)
    try:
        graphs = [graph for number, graph in _fields(model) if number == 7]
        return GraphFile(
            locations=frozenset(_locations(model, "model")),
            inputs=dict(_described(item) for graph in graphs for number, item in _fields(graph) if number == 11),
            outputs=dict(_described(item) for graph in graphs for number, item in _fields(graph) if number == 12),
        )
    except (IndexError, ValueError, RecursionError) as error:
        raise _damaged(path) from error


def external_locations(path: Path) -> frozenset[str]:
    """Every ``location`` of external data in the ONNX file; see :func:`read_graph`."""
    return read_graph(path).locations


def initializer_names(path: Path) -> frozenset[str]:
    """The names of the weights that the graph in the ONNX file reads.

    Raises:
        BundleError: when the file is not a readable protocol buffer.
    """
    try:
        graphs = [graph for number, graph in _fields(read_model(path)) if number == 7]
        tensors = [tensor for graph in graphs for number, tensor in _fields(graph) if number == 5]
        return frozenset(bytes(name).decode() for tensor in tensors for number, name in _fields(tensor) if number == 8)
    except (IndexError, ValueError) as error:
        raise _damaged(path) from error


def weight_bytes(path: Path) -> int:
    """How many bytes of its weights files the graph in the ONNX file reads.

    Raises:
        BundleError: when the file is not a readable protocol buffer.
    """
    try:
        return sum(length for _, _, length in set(_external(read_model(path))))
    except (IndexError, KeyError, ValueError) as error:
        raise _damaged(path) from error


def read_model(path: Path) -> memoryview:
    """The bytes of an ONNX file; raises BundleError where it is no file, or larger than a protocol buffer can be."""
    try:
        return memoryview(read_bytes(path, MOST_BYTES))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {why(error)}; copy or export the bundle again") from error


def _damaged(path: Path) -> BundleError:
    return BundleError(f"{path} is not an ONNX file, or is cut off; export the bundle again")


def _external(model: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(location, offset, length) of each initializer whose values lie in another file."""
    graphs = (graph for number, graph in _fields(model) if number == 7)
    for tensor in (tensor for graph in graphs for number, tensor in _fields(graph) if number == 5):
        entries = [dict(_fields(entry)) for number, entry in _fields(tensor) if number == 13]
        values = {bytes(entry[1]): bytes(entry[2]) for entry in entries if entry.keys() >= {1, 2}}
        if values:
            yield values[b"location"], int(values.get(b"offset", b"0")), int(values[b"length"])


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    if kind == "entry":
        fields = {number: bytes(value) for number, value in _fields(message)}
        if fields.get(1) == b"location":
            yield fields.get(2, b"").decode()
        return
    ways = WAYS[kind]
    for number, value in _fields(message):
        if number in ways:
            yield from _locations(value, ways[number])


def _described(message: memoryview) -> tuple[str, Described]:
    """A ValueInfoProto; a field that stands there twice, which readers merge, is refused."""
    value = _once(message)
    tensor = _once(_message(_once(_message(value.get(2))).get(1)))
    dimensions = [_once(item) for number, item in _fields(_message(tensor.get(2))) if number == 1]
    sizes = [item.get(1) for item in dimensions]
    shape = tuple(size if isinstance(size, int) else None for size in sizes)
    dtype = tensor.get(1)
    return bytes(_message(value.get(1))).decode(), (DTYPES.get(dtype, "") if isinstance(dtype, int) else "", shape)


def _once(message: memoryview) -> dict[int, Value]:
    """The first two fields of a message that has neither twice."""
    found: dict[int, Value] = {}
    for number, _, value in fields(message):
        if number in found:
            raise IndexError
        if number in (1, 2):
            found[number] = value
    return found


def _message(value: Value | None) -> memoryview:
    return value if isinstance(value, memoryview) else memoryview(b"")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message."""
    for number, _, value in fields(message):
        if isinstance(value, memoryview):
            yield number, value
