"""Float16 graphs, strongly typed, with float32 islands where a measurement says that float16 breaks.

The float32 graph is run once more with two gauges on every node: the largest magnitude of what goes in and comes out,
and how far its output moves when its inputs are rounded to float16. A node that comes near float16's end, 65504, stays
in float32. So does one that magnifies the rounding, together with what feeds it up to and with the first nodes that
read a weight: an input that was computed in float16 would carry the error in. Every other node computes in float16, on
the weights as they are stored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from calotype.export.parity import Cases, run_graph
from calotype.runtime.bundle.parity import Outputs

LARGEST = 65504 / 8  # leaves room for inputs that were not tried
MAGNIFIED = 0.01  # of an output's largest magnitude: twenty times the rounding of one number
# Inputs that an operator wants in float32 whatever it computes in.
FLOAT32_INPUTS = {"Resize": (1, 2)}  # region of interest, scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gauge:
    """What a node showed: the largest magnitude in or out of it, and the relative error from rounded inputs.

    The error is not finite where rounding overflowed.
    """

    largest: float
    error: float

    @property
    def near_the_end(self) -> bool:
        """Whether other inputs may overflow it."""
        return self.largest > LARGEST

    @property
    def magnifies(self) -> bool:
        """Whether its inputs must not be rounded."""
        return math.isfinite(self.error) and self.error > MAGNIFIED


def measure(graph: Path, cases: Cases) -> dict[str, Gauge]:
    """Run the float32 ``graph`` on ``cases`` with gauges on every node; the worst that each showed, by its name."""
    model = ir.load(graph)
    names = _add_gauges(model.graph)
    worst = np.zeros((len(names), 2))
    with tempfile.NamedTemporaryFile(dir=graph.parent, prefix=".gauges.", suffix=".onnx") as file:
        ir.save(model, file.name)
        outputs = run_graph(Path(file.name), cases)
    for (readings,) in outputs.values():
        into, out, moved = readings.reshape(-1, 3).astype(np.float64).T
        errors = moved / np.maximum(out, np.finfo(np.float32).tiny)
        worst = np.maximum(worst, np.stack([np.maximum(into, out), errors], axis=1))
    return {
        name: Gauge(largest=largest, error=error) for name, (largest, error) in zip(names, worst.tolist(), strict=True)
    }


def part_of(gauges: Mapping[str, Gauge], graph: Path) -> dict[str, Gauge]:
    """The gauges of the nodes that ``graph`` has."""
    names = {node.name for node in ir.load(graph).graph}
    return {name: gauge for name, gauge in gauges.items() if name in names}


def find_islands(graph: Path, gauges: Mapping[str, Gauge]) -> dict[str, Gauge]:
    """The nodes of ``graph`` that stay in float32, each with its gauge."""
    model = ir.load(graph)
    weights = _weights(model.graph)
    islands = {name for name, gauge in gauges.items() if gauge.near_the_end or gauge.magnifies}
    waiting = [node for node in model.graph if node.name in islands and gauges[node.name].magnifies]
    while waiting:
        for value in waiting.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is None or producer.name is None or producer.name not in gauges.keys() - islands:
                continue
            islands.add(producer.name)
            if not weights.intersection(producer.inputs):
                waiting.append(producer)
    return {name: gauge for name, gauge in gauges.items() if name in islands}


def write_float16(graph: Path, islands: Collection[str], path: Path) -> None:
    """Write ``graph``, whose weights are stored in float16, as one that computes in it outside ``islands``.

    Inputs and outputs stay float32.
    """
    model = ir.load(graph)
    wanted = {
        node: ir.DataType.FLOAT if node.name in islands else ir.DataType.FLOAT16 for node in _float_nodes(model.graph)
    }
    for node, precision in wanted.items():
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", precision)
        for output in node.outputs:
            output.dtype = precision
    casts = _Casts(model.graph)
    for node, precision in wanted.items():
        for index, value in enumerate(node.inputs):
            if value is not None and index not in FLOAT32_INPUTS.get(node.op_type, ()):
                node.replace_input_with(index, casts.to(precision, value))
    for index, value in enumerate(model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            name, value.name = str(value.name), f"{value.name}.float16"
            model.graph.outputs[index] = casts.to(ir.DataType.FLOAT, value)
            model.graph.outputs[index].name = name
    RemoveUnusedNodesPass()(model)
    ir.save(model, path)


def write_rounded(graph: Path, islands: Collection[str], path: Path) -> None:
    """Write ``graph`` as one that computes in float32 what a machine that has float16 makes of it with ``islands``.

    ONNX Runtime on a CPU computes float16 nodes in float32 and keeps what lies between two of them unrounded, which
    hides overflows. Here every value outside the islands is rounded; sums inside a node are float32, as they are in
    the matrix units of GPUs.
    """
    model = ir.load(graph)
    tape = Tape(model.graph)
    for value in model.graph.inputs:
        if _is_float(value):
            _round_uses(tape, value, [use for use in value.uses() if use.node.name not in islands])
    for node in _float_nodes(model.graph):
        for value in node.outputs:
            # What crosses an island's border is rounded on the way in; inside, nothing is.
            inside = node.name in islands
            _round_uses(tape, value, [use for use in value.uses() if not (inside and use.node.name in islands)])
    model.graph.sort()
    ir.save(model, path)


def run_float16(graph: Path, islands: Collection[str], cases: Cases) -> Outputs:
    """What :func:`write_rounded` gives for ``cases``."""
    with tempfile.NamedTemporaryFile(dir=graph.parent, prefix=".rounded.", suffix=".onnx") as file:
        write_rounded(graph, islands, Path(file.name))
        return run_graph(Path(file.name), cases)


class _Casts:
    """A graph's values in another float type, each cast once, right where it is made."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def to(self, precision: ir.DataType, value: ir.Value) -> ir.Value:
        """``value`` in ``precision``; itself where it has it already, or is no float."""
        if not _is_float(value) or value.dtype == precision:
            return value
        if (value, precision) not in self._made:
            self._made[value, precision] = self._make(precision, value)
        return self._made[value, precision]

    def _make(self, precision: ir.DataType, value: ir.Value) -> ir.Value:
        producer = value.producer()
        if producer is not None and _reads_stored(producer) and (stored := producer.inputs[0]) is not None:
            return stored
        name = f"{value.name}.{precision.name.lower()}"
        if value.is_initializer() and value.const_value is not None and producer is None:
            tensor = ir.tensor(value.const_value.numpy().astype(precision.numpy()), name=name)
            constant = ir.Value(name=name, type=ir.TensorType(precision), shape=value.shape, const_value=tensor)
            self._graph.register_initializer(constant)
            return constant
        out = ir.Value(name=name, type=ir.TensorType(precision), shape=value.shape)
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", precision)], outputs=[out], name=f"cast.{name}")
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(producer, cast)
        return out


def _round_uses(tape: Tape, value: ir.Value, uses: Collection[Any]) -> None:
    if uses:
        rounded = _rounded(tape, value)
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)


def _add_gauges(graph: ir.Graph) -> list[str]:
    """Give ``graph`` one output, three readings a node: largest in, largest out, how far out moved.

    Returns:
        The nodes' names.
    """
    weights = _weights(graph)
    nodes = [node for node in _float_nodes(graph) if not weights.intersection(node.outputs)]
    tape = Tape(graph)
    largest = functools.cache(functools.partial(_largest, tape))
    rounded = functools.cache(functools.partial(_rounded, tape))
    readings = []
    for node in nodes:
        given = [value for value in node.inputs if value is not None and _is_float(value) and value not in weights]
        twin = ir.Node(
            node.domain,
            node.op_type,
            [rounded(value) if value in given else value for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
            graph=graph,
        )
        moved = [tape.op("Sub", pair) for pair in zip(node.outputs, twin.outputs, strict=True)]
        inside = [_logits(tape, node)] if node.op_type == "Attention" else []
        readings += [
            tape.op("Max", [largest(value) for value in values])
            for values in ([*given, *inside] or node.outputs, node.outputs, moved)
        ]
    graph.outputs[:] = [tape.op("Concat", readings, {"axis": 0})]
    graph.outputs[0].dtype = ir.DataType.FLOAT
    return [str(node.name) for node in nodes]


def _largest(tape: Tape, value: ir.Value) -> ir.Value:
    """The largest magnitude in ``value``, (1, 1)."""
    return tape.op("Flatten", [tape.op("ReduceMax", [tape.op("Abs", [value])])], {"axis": 0})


def _logits(tape: Tape, attention: ir.Node) -> ir.Value:
    """What attention takes the softmax of, (B, heads, N, M): it overflows where no fused kernel keeps it inside."""
    query, key = attention.inputs[:2]  # (B, heads, N, C), (B, heads, M, C)
    assert query is not None and query.shape is not None and isinstance(query.shape[-1], int)
    scale = tape.op("Constant", [], {"value_float": query.shape[-1] ** -0.5})
    return tape.op("MatMul", [tape.op("Mul", [query, scale]), tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})])


def _rounded(tape: Tape, value: ir.Value) -> ir.Value:
    """``value`` through float16."""
    return tape.op("Cast", [tape.op("Cast", [value], {"to": ir.DataType.FLOAT16})], {"to": ir.DataType.FLOAT})


def _float_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that compute in a float type. Reading a stored weight is not computing."""
    return (node for node in list(graph) if _is_float(node.outputs[0]) and not _reads_stored(node))


def _weights(graph: ir.Graph) -> set[ir.Value]:
    """The stored weights, and what is made of nothing else: their casts, transposes and slices."""
    stored = set(graph.initializers.values())
    weights = {value for value in stored if isinstance(value.const_value, ir.ExternalTensor)}
    for node in graph:
        given = {value for value in node.inputs if value is not None}
        if given & weights and given <= weights | stored:
            weights.update(node.outputs)
    return weights


def _reads_stored(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].is_initializer()


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
