"""A graph that nodes are replaced in: who makes and who reads each of its values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"
Arrays = Mapping[str, NDArray[Any]]  # weights by name


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
        self.inputs = [item.name for item in graph.input]
        self._outputs = {item.name for item in graph.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._instead: dict[str, list[onnx.NodeProto]] = {}

    def only_reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of that type, where nothing else reads ``name``."""
        readers = self._readers[name]
        alone = len(readers) == 1 and readers[0].op_type == op_type and name not in self._outputs
        return readers[0] if alone else None

    def origin(self, name: str) -> str:
        """What ``name`` is cast from, or ``name``."""
        maker = self.makers.get(name)
        return maker.input[0] if maker is not None and maker.op_type == "Cast" else name

    def weight(self, name: str) -> list[int] | None:
        """The shape of the initializer that ``name`` is, or is cast from."""
        tensor = self.initializers.get(self.origin(name))
        return None if tensor is None else list(tensor.dims)

    def floats(self, name: str, stored: Arrays) -> NDArray[np.float32]:
        """The values of the initializer that ``name`` is, or is cast from; ``stored`` has those outside the graph."""
        name = self.origin(name)
        return np.asarray(
            stored[name] if name in stored else numpy_helper.to_array(self.initializers[name]), np.float32
        )

    def integers(self, name: str) -> list[int] | None:
        """The values of an int64 initializer that stands in the graph."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
            return None
        return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]

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
                read.update(reads(node))
        del self._graph.node[:]
        self._graph.node.extend(reversed(kept))
        kept_tensors = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept_tensors)


def reads(node: onnx.NodeProto) -> set[str]:
    """What ``node`` reads, and what the graphs inside it do."""
    inside = [own for item in node.attribute if item.HasField("g") for own in item.g.node]
    return set(node.input).union(*map(reads, inside))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """By name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def import_contrib(model: onnx.ModelProto) -> None:
    """Let ``model`` use ONNX Runtime's own operators."""
    if not any(opset.domain == CONTRIB for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
