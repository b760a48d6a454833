"""A graph whose products are of eight-bit integers, which a processor multiplies several times as fast as floats.

Weights are rounded once, to int8 with a scale for each output channel. What they are multiplied with is rounded to
uint8 as it comes: for a matrix product between the least and the largest value that it has, which is of one image since
the denoiser never mixes two; for a convolution between those that were seen before, since ONNX Runtime's only fast one
(``QLinearConv``) rounds its output too, and needs that range beforehand. Signed activations have no fast kernel on
x86-64, and ``ConvInteger`` is slower than floats (``python -m benchmarks.micro int8-operators``).

What carries few operations stays in float32, and so does what reads or writes values as they are, without a
normalisation in between: there rounding costs most.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from calotype.engine.graph import CONTRIB, Arrays, Graph, import_contrib
from calotype.runtime.graphs.layouts import TURNED, Layout, Step
from calotype.runtime.graphs.quantization import per_channel, summed_bias

Ranges = Mapping[str, tuple[float, float]]
OPERATORS = ("Conv", "MatMul")
EDGES = ("Min", "Max")
KEPT = ("conv_in.", "conv_out.", "conv_shortcut.", "samplers.")
INLINE = 1024  # bytes from which on a tensor is given beside the graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A product with constant weights; ``turned`` ones lie as (N, K) instead of (K, N)."""

    node: onnx.NodeProto
    weight: str
    turned: bool


def find_layers(graph: Graph, operators: Sequence[str] = OPERATORS) -> list[Layer]:
    """Those that are computed in integers."""
    found = []
    for node in graph.nodes:
        if node.op_type not in operators:
            continue
        name, turned = node.input[1], False
        while name in graph.makers and graph.makers[name].op_type in ("Cast", "Transpose"):
            turned ^= graph.makers[name].op_type == "Transpose"
            name = graph.makers[name].input[0]
        if name in graph.initializers and not any(kept in name for kept in KEPT):
            found.append(Layer(node=node, weight=name, turned=turned))
    return found


def observed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """``model`` with the ranges that convolutions need as further outputs, least and largest, and of which values."""
    watched = copy.deepcopy(model)
    convolutions = [layer.node for layer in find_layers(Graph(watched.graph), ("Conv",))]
    names = sorted({name for node in convolutions for name in (node.input[0], node.output[0])})
    for name in names:
        for edge in EDGES:
            watched.graph.node.append(helper.make_node(f"Reduce{edge}", [name], [f"{name}.{edge}"], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(f"{name}.{edge}", onnx.TensorProto.FLOAT, []))
    return watched, names


def quantize(
    model: onnx.ModelProto, stored: Arrays, ranges: Ranges, operators: Sequence[str] = OPERATORS
) -> tuple[dict[str, NDArray[Any]], dict[str, Layout]]:
    """Rewrite ``model`` in place.

    Returns the large tensors that it reads besides ``stored``, by name; and what the rounded ones are made from.

    Args:
        model: with weights in ``stored`` where they are external data.
        stored: by name.
        ranges: least and largest of what convolutions read and write.
        operators: which products are computed in integers.
    """
    quantizer = _Quantizer(model.graph, stored, ranges)
    for layer in find_layers(quantizer.graph, operators):
        (quantizer.convolution if layer.node.op_type == "Conv" else quantizer.product)(layer)
    quantizer.graph.finish()
    import_contrib(model)
    return quantizer.added, quantizer.layouts


class _Quantizer:
    def __init__(self, graph: onnx.GraphProto, stored: Arrays, ranges: Ranges) -> None:
        self.graph, self.added = Graph(graph), dict[str, NDArray[Any]]()
        self.layouts: dict[str, Layout] = {}
        self._stored, self._ranges = stored, ranges
        self._rounded: set[str] = set()

    def convolution(self, layer: Layer) -> None:
        """Input and output rounded by the ranges seen."""
        node, out = layer.node, layer.node.output[0]
        made, (x, x_scale, x_zero) = self._rounded_by_range(node.input[0])
        weights, scales = per_channel(self._float(layer.weight), axis=0)
        names, output = self._kept(layer, out, weights, scales, 0), self._range(out)
        zeros = self._constant(f"{out}.zeros", np.zeros(len(scales), np.int8))
        inputs = [x, x_scale, x_zero, *names, zeros, *output]
        if len(node.input) > 2:
            unit = self._scale(node.input[0])
            bias = self._constant(f"{out}.int32", summed_bias(self._float(node.input[2]), scales, unit))
            steps: tuple[Step, ...] = (("sum", [self.graph.origin(node.input[2]), float(unit)]),)
            self.layouts[bias] = Layout(tensor=layer.weight, steps=steps)
            inputs.append(bias)
        made.append(helper.make_node("QLinearConv", inputs, [f"{out}.uint8"]))
        made[-1].attribute.extend(node.attribute)
        made.append(helper.make_node("DequantizeLinear", [f"{out}.uint8", *output], [out]))
        self.graph.replace(node, made)

    def product(self, layer: Layer) -> None:
        """Input rounded by its own range; a bias that is added goes in."""
        node, last, bias = layer.node, layer.node, ""
        sum_ = self.graph.only_reader(node.output[0], "Add")
        if sum_ is not None:
            other = self.graph.origin(next(name for name in sum_.input if name != node.output[0]))
            if other in self.graph.initializers and len(self.graph.initializers[other].dims) == 1:
                last, bias = sum_, self._constant(f"{sum_.output[0]}.bias", self._float(other))
                self.layouts[bias] = Layout(tensor=other)
        out, x = last.output[0], node.input[0]
        rounded = [f"{x}.uint8", f"{x}.scale", f"{x}.zero"]
        made = [] if rounded[0] in self._rounded else [helper.make_node("DynamicQuantizeLinear", [x], rounded)]
        self._rounded.add(rounded[0])
        matrix = self._float(layer.weight)
        weights, scales = per_channel(np.ascontiguousarray(matrix.T) if layer.turned else matrix, axis=1)
        whole, worth = self._kept(layer, out, weights, scales, 1)
        inputs = [rounded[0], whole, rounded[1], worth, rounded[2], "", bias]
        made.append(helper.make_node("MatMulIntegerToFloat", inputs, [out], domain=CONTRIB))
        self.graph.replace(last, made)

    def _kept(
        self, layer: Layer, out: str, weights: NDArray[np.int8], scales: NDArray[np.float32], axis: int
    ) -> tuple[str, str]:
        """The names of a layer's weights and scales, of which it is noted what they are made from."""
        turned = TURNED if layer.turned else ()
        names = self._constant(f"{out}.int8", weights), self._constant(f"{out}.scales", scales)
        for name, step in zip(names, ("int8", "scales"), strict=True):
            self.layouts[name] = Layout(tensor=layer.weight, steps=(*turned, (step, axis)))
        return names

    def _rounded_by_range(self, name: str) -> tuple[list[onnx.NodeProto], tuple[str, str, str]]:
        scale, zero = self._range(name)
        rounded = f"{name}.in_range"
        made = [helper.make_node("QuantizeLinear", [name, scale, zero], [rounded])]
        new = rounded not in self._rounded
        self._rounded.add(rounded)
        return (made if new else []), (rounded, scale, zero)

    def _range(self, name: str) -> tuple[str, str]:
        """The names of scale and zero point that spread the range of ``name`` over a byte."""
        low = min(self._ranges[name][0], 0)
        scale = self._scale(name)
        zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
        return self._constant(f"{name}.range", scale), self._constant(f"{name}.nought", zero)

    def _scale(self, name: str) -> np.float32:
        low, high = self._ranges[name]
        return np.float32(max(max(high, 0) - min(low, 0), 1e-12) / 255)

    def _float(self, name: str) -> NDArray[np.float32]:
        return self.graph.floats(name, self._stored)

    def _constant(self, name: str, value: Any) -> str:
        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        if name in self.graph.initializers:
            return name
        if array.nbytes < INLINE:
            return self.graph.constant(name, array)
        self.added[name] = array
        return self.graph.external(name, array)


def widest(seen: Iterable[Sequence[NDArray[Any]]], names: Sequence[str]) -> Ranges:
    """The ranges of ``names`` over runs, each a least and a largest value for every name in turn."""
    edges = np.array([[float(value) for value in run] for run in seen]).reshape(-1, len(names), 2)
    low, high = edges[..., 0].min(0), edges[..., 1].max(0)
    return {name: (float(low[index]), float(high[index])) for index, name in enumerate(names)}
