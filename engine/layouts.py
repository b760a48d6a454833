"""Which of a bundle's tensors each of an engine's weights is made from, and how; see
:mod:`calotype.runtime.graphs.layouts`.

It is found by the names that values keep through ONNX Runtime's optimizations, and each finding is checked: the steps
from the bundle's tensor must give the engine's weight to the bit. A tensor whose every use is not so found is fixed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calotype.engine.graph import Arrays, attributes
from calotype.runtime.graphs.layouts import Layout, Layouts
from calotype.runtime.graphs.remarks import LAYOUTS

NCHWC, NAMED = "com.microsoft.nchwc", "_nchwc"
BLOCKS = (16, 8, 4)


class Uses:
    """Where a graph, before it is optimized, uses each tensor: by value, and by the convolution that reads it.

    Args:
        graph: with the names of the bundle's tensors.
        stored: the bundle's tensors.
    """

    def __init__(self, graph: onnx.GraphProto, stored: Arrays) -> None:
        self.layouts: dict[str, Layout] = {}
        self.convolutions: dict[str, list[str]] = {}  # by what they make: what they read
        self.used: dict[str, list[tuple[str, str]]] = defaultdict(list)  # by tensor: value, and the convolution or ""
        self.fixed: set[str] = set()
        constants = {tensor.name: tensor for tensor in graph.initializer}
        self.layouts = {name: Layout(tensor=name) for name in constants if name in stored}
        shapes = {name: list(stored[name].shape) for name in self.layouts}
        known = set(constants)
        for node in graph.node:
            if self._is_step(node, constants, shapes):
                known.update(node.output)
                continue
            if node.op_type == "Conv":
                self.convolutions[node.output[0]] = list(node.input)
            folded = bool(node.input) and known.issuperset(filter(None, node.input))
            if folded:
                known.update(node.output)
            for name in node.input:
                if name not in self.layouts:
                    continue
                self.used[self.layouts[name].tensor].append((name, node.output[0] if node.op_type == "Conv" else ""))
                if folded:
                    self.fixed.add(self.layouts[name].tensor)

    def _is_step(
        self, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], shapes: dict[str, list[int]]
    ) -> bool:
        """Whether ``node`` lays out a tensor, which is noted under the name of what it makes."""
        own = self.layouts.get(node.input[0]) if node.input else None
        if own is None:
            return False
        shape, (made,) = shapes[node.input[0]], node.output[:1]
        if node.op_type == "Cast" and attributes(node)["to"] == onnx.TensorProto.FLOAT:
            steps, new = own.steps, shape
        elif node.op_type == "Transpose":
            axes = list(attributes(node).get("perm", reversed(range(len(shape)))))
            steps, new = (*own.steps, ("transpose", axes)), [shape[axis] for axis in axes]
        elif node.op_type == "Reshape" and node.input[1] in constants:
            sizes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
            new = [shape[index] if size == 0 else size for index, size in enumerate(sizes)]
            rest = math.prod(shape) // abs(math.prod(new))
            new = [rest if size == -1 else size for size in new]
            steps = (*own.steps, ("reshape", new))
        else:
            return False
        self.layouts[made], shapes[made] = Layout(tensor=own.tensor, steps=steps), new
        return True


def annotate(
    model: onnx.ModelProto, weights: Path, uses: Uses, stored: Arrays, rounded: Mapping[str, Layout] | None = None
) -> Layouts:
    """Find the layouts of an engine, and write them into its graph.

    Args:
        model: the engine's.
        weights: the file of its weights.
        uses: of the graph that it was made from.
        stored: the bundle's tensors.
        rounded: those of its weights that are in integers, or belong to such.
    """
    engine = _Engine(model.graph, weights)
    found: dict[str, Layout] = {}
    fixed = set(uses.fixed)
    for tensor, places in uses.used.items():
        own = {name: item for name, item in (rounded or {}).items() if tensor in item.tensors}
        if own:
            if len(places) > 1 or not all(engine.equals(*item, stored) for item in own.items()):
                fixed.add(tensor)
            found |= own
            continue
        for value, convolution in places:
            named = engine.candidates(uses, value, convolution)
            match = next((item for item in named if engine.equals(*item, stored)), None)
            if match is None:
                fixed.add(tensor)
                break
            own[match[0]] = match[1]
        if tensor not in fixed:
            found |= own
    layouts = Layouts(of=found, fixed=frozenset(fixed))
    del model.metadata_props[:]
    model.metadata_props.add(key=LAYOUTS, value=layouts.to_text())
    return layouts


class _Engine:
    def __init__(self, graph: onnx.GraphProto, weights: Path) -> None:
        self._tensors, self._folder = {tensor.name: tensor for tensor in graph.initializer}, weights.parent
        self._blocked = {
            node.name.partition(NAMED)[0]: list(node.input)
            for node in graph.node
            if node.domain == NCHWC and node.op_type == "Conv"
        }

    def candidates(self, uses: Uses, value: str, convolution: str) -> list[tuple[str, Layout]]:
        """What may have become of ``value`` where ``convolution`` reads it, "" for any other node."""
        layout = uses.layouts[value]
        found = [(value, layout)]
        if not convolution:
            return found
        place = uses.convolutions[convolution].index(value)
        few = self._tensors.get(f"{convolution}.weights")
        if few is not None and place == 1:
            found.append((few.name, _then(layout, "spread", math.isqrt(few.dims[1]) - 2)))
        if few is not None and place == 2:
            found.append((f"{convolution}.bias", _then(layout, "reshape", [-1, 1, 1])))
        blocked = self._blocked.get(convolution)
        if blocked is not None and place == 1:
            found += [
                (blocked[1], _then(layout, step, size)) for size in BLOCKS for step in ("blocks", "output_blocks")
            ]
        elif blocked is not None and len(blocked) > place and blocked[place] in self._tensors:
            found.append((blocked[place], _then(layout, "pad", self._tensors[blocked[place]].dims[0])))
        return found

    def equals(self, name: str, layout: Layout, stored: Arrays) -> bool:
        """Whether the engine's weight ``name`` is what the bundle's tensor gives."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return False
        try:
            made = layout.apply(stored[layout.tensor], lambda other: stored[other].astype(np.float32))
        except ValueError:
            return False
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return (tuple(tensor.dims), dtype) == (made.shape, made.dtype) and np.array_equal(
            self._values(tensor, dtype), made.reshape(-1)
        )

    def _values(self, tensor: onnx.TensorProto, dtype: np.dtype[Any]) -> np.ndarray[tuple[int], Any]:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            return onnx.numpy_helper.to_array(tensor).reshape(-1)
        place = self._folder / where["location"]
        return np.memmap(place, dtype, "r", int(where.get("offset", 0)), (math.prod(tensor.dims),))


def _then(layout: Layout, step: str, argument: object) -> Layout:
    return Layout(tensor=layout.tensor, steps=(*layout.steps, (step, argument)))
