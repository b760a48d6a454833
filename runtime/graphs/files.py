"""What an ONNX file says of its weights, read straight from the protocol buffer, without the onnx package.

The field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.protobuf import fields

# Message -> field number -> message found there. Only the ways that lead to a tensor are followed.
_FIELDS = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_locations(path: Path) -> set[str]:
    """Every ``location`` of external data in the ONNX file.

    Raises:
        BundleError: when the file is not a readable protocol buffer.
    """
    try:
        return set(_locations(memoryview(path.read_bytes()), "model"))
    except (IndexError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not an ONNX file, or is cut off; export the bundle again") from error


def initializer_names(path: Path) -> frozenset[str]:
    """The names of the weights that the graph in the ONNX file reads.

    Raises:
        BundleError: when the file is not a readable protocol buffer.
    """
    try:
        graphs = [graph for number, graph in _fields(memoryview(path.read_bytes())) if number == 7]
        tensors = [tensor for graph in graphs for number, tensor in _fields(graph) if number == 5]
        return frozenset(bytes(name).decode() for tensor in tensors for number, name in _fields(tensor) if number == 8)
    except (IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not an ONNX file, or is cut off; export the bundle again") from error


def weight_bytes(path: Path) -> int:
    """How many bytes of its weights files the graph in the ONNX file reads.

    Raises:
        BundleError: when the file is not a readable protocol buffer.
    """
    try:
        return sum(length for _, _, length in set(_external(memoryview(path.read_bytes()))))
    except (IndexError, KeyError, ValueError) as error:
        raise BundleError(f"{path} is not an ONNX file, or is cut off; export the bundle again") from error


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
    ways = _FIELDS[kind]
    for number, value in _fields(message):
        if number in ways:
            yield from _locations(value, ways[number])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message."""
    for number, _, value in fields(message):
        if isinstance(value, memoryview):
            yield number, value
