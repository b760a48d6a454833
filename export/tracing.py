"""PyTorch modules to ONNX graphs whose weights are the tensors of a ``.safetensors`` file, not copies of them.

Opset 23: attention, group and layer normalisation and GELU each leave as one node, which runtimes have fused kernels
for. Nothing that reads a weight is folded, since the folded constant would be a second copy of it.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from safetensors import safe_open

from calotype.export.graphs import PREFIX, Addition, GraphPlan
from calotype.export.image_prompts import add_image_prompts
from calotype.export.weights import Location, locate
from calotype.runtime.bundle.parity import random_inputs
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import ExportError

OPSET = 23
SIZES = {
    "batch": 2, "rows": 2, "extra": 3, "tokens": 7, "pictures": 2, "references": 5, "height": 8, "width": 16
}  # fmt: skip


def write_graph(plan: GraphPlan, weights: Path, path: Path) -> None:
    """Trace the module and write its graph, float32 in computation, beside the weights file it points into."""
    inputs = random_inputs(plan.inputs, SIZES, plan.tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, which nobody here can act on
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            plan.module,
            kwargs={name: torch.from_numpy(array) for name, array in inputs.items()},
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in plan.inputs],
            output_names=[spec.name for spec in plan.outputs],
            dynamic_shapes={spec.name: _dynamic(spec) for spec in plan.inputs},
        )
    assert program is not None
    model = program.model
    model.graph.name = plan.network
    locations = locate(weights)
    weight_names = {name for name in model.graph.initializers if name.removeprefix(PREFIX) in locations}
    onnxscript.optimizer.fold_constants(model, should_fold=lambda node: _may_fold(node, weight_names))
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of the machine that exported
    _point_into(model, weights, locations)
    _complete_types(model.graph)
    specs = {spec.name: spec for spec in (*plan.inputs, *plan.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in specs:
            value.shape = ir.Shape(list(specs[value.name].shape))
    ir.save(model, path)
    del program
    gc.collect()  # the exporter leaves cycles behind that hold the module's weights


def write_part(whole: Path, plan: GraphPlan, path: Path) -> None:
    """Write the part of the graph ``whole`` that makes the plan's outputs of its inputs; outputs may become inputs.

    Raises:
        ExportError: there is something to add, and it is not seen where.
    """
    model = ir.load(whole)
    graph = model.graph
    graph.name = plan.network
    made = {value.name: value for value in graph.outputs}
    graph.outputs[:] = [made[spec.name] for spec in plan.outputs]
    for spec in plan.inputs:
        value = made.get(spec.name)
        if value is not None:
            given = ir.Value(type=value.type, shape=value.shape)
            value.replace_all_uses_with(given)
            value.name, given.name = f"{spec.name}.unused", spec.name
            graph.inputs.append(given)
    _add(graph, plan.additions)
    add_image_prompts(graph, plan.image_prompts)
    RemoveUnusedNodesPass()(model)
    ir.save(model, path)


def _add(graph: ir.Graph, additions: Sequence[Addition]) -> None:
    """Make inputs of ``additions``, which are added to a UNet's skip connections and behind its middle.

    Where the way up joins a skip connection is a concatenation of feature maps: the deepest comes first, and what it
    is joined to there is what comes out of the middle.
    """
    if not additions:
        return
    joins = [node for node in graph if _joins_feature_maps(node)]
    places = [(join, 1) for join in reversed(joins)] + [(join, 0) for join in joins[:1]]
    needed = 1 + max(addition.place for addition in additions)
    if len(places) != needed:
        raise ExportError(
            f"the UNet's graph joins {len(joins)} skip connections, and it has {needed - 1}; "
            "report this with the versions of torch and onnxscript"
        )
    for addition in additions:
        spec, (join, index) = addition.spec, places[addition.place]
        given = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(spec.shape)))
        graph.inputs.append(given)
        value = join.inputs[index]
        assert value is not None
        uses = list(value.uses()) if addition.onward else [(join, index)]
        total = ir.node("Add", [value, given], name=f"add.{spec.name}")
        total.outputs[0].name = f"{spec.name}.added"
        total.outputs[0].type, total.outputs[0].shape = given.type, value.shape
        maker = value.producer()
        assert maker is not None
        graph.insert_after(maker, total)
        for user, at in uses:
            user.replace_input_with(at, total.outputs[0])


def _joins_feature_maps(node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    axis = node.attributes.get_int("axis", 0)
    return node.op_type == "Concat" and shape is not None and len(shape) == 4 and axis in (1, -3)


def _dynamic(spec: TensorSpec) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if not isinstance(size, int)}


def _may_fold(node: ir.Node, weights: set[str]) -> bool | None:
    """False keeps a node that reads a weight; None leaves the choice to the optimizer."""
    return False if any(value is not None and value.name in weights for value in node.inputs) else None


def _point_into(model: ir.Model, weights: Path, locations: Mapping[str, Location]) -> None:
    """Make each weight an external tensor in ``weights``, cast to float32 where it is stored in less."""
    stored = ir.DataType.FLOAT16 if _is_half(weights) else ir.DataType.FLOAT
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        key = name.removeprefix(PREFIX)
        if key not in locations:
            continue
        del graph.initializers[name]
        uses = list(value.uses())
        if not uses:
            continue
        place = locations[key]
        tensor = ir.ExternalTensor(
            weights.name,
            place.offset,
            place.length,
            stored,
            shape=ir.Shape(value.shape or []),
            name=key,
            base_dir=str(weights.parent),
        )
        initializer = ir.Value(name=key, type=ir.TensorType(stored), shape=tensor.shape, const_value=tensor)
        graph.initializers[key] = initializer
        replacement = initializer
        if stored != ir.DataType.FLOAT:
            cast = ir.node("Cast", [initializer], {"to": ir.DataType.FLOAT})
            cast.outputs[0].name = f"{key}.float32"
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            cast.outputs[0].shape = tensor.shape
            replacement = cast.outputs[0]
            casts.append(cast)
        for user, index in uses:
            user.replace_input_with(index, replacement)
    if casts:
        graph.insert_before(graph[0], casts)


def _complete_types(graph: ir.Graph) -> None:
    """The exporter leaves some values of its own making without a type; it is that of what they are made of."""
    for node in graph:
        for value in node.outputs:
            if value.type is None:
                given = None if node.op_type == "Shape" else node.inputs[0]
                value.type = ir.TensorType(ir.DataType.INT64) if given is None else given.type


def _is_half(weights: Path) -> bool:
    with safe_open(weights, framework="pt") as file:
        return bool(file.get_slice(next(iter(file.keys()))).get_dtype() == "F16")
