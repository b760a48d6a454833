"""Does a graph compute what its PyTorch module computes? Both run on the CPU, on random and on edge inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from calotype.export.graphs import GraphPlan
from calotype.runtime.bundle.parity import Figures, Inputs, Outputs, judge
from calotype.runtime.errors import ExportError
from calotype.runtime.onnx_runtime import import_onnxruntime
from calotype.runtime.untrusted import why

REPORT = "please report it, and which checkpoint it is"
Cases = Mapping[str, Inputs]


def run_module(plan: GraphPlan, cases: Cases) -> Outputs:
    """What the PyTorch module gives for each case."""
    outputs: Outputs = {}
    for case, inputs in cases.items():
        with torch.no_grad():
            made = plan.module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        outputs[case] = [tensor.numpy() for tensor in ((made,) if isinstance(made, Tensor) else made)]
    return outputs


def run_graph(graph: Path, cases: Cases) -> Outputs:
    """What ONNX Runtime gives for each case, without its optimizer, which folds a second copy of the weights."""
    onnxruntime = import_onnxruntime("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # What a run frees is given back; the arena and its patterns would grow from case to case.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return {case: session.run(None, inputs) for case, inputs in cases.items()}
    except Exception as error:  # the library's own exceptions have no common class but this
        raise ExportError(f"ONNX Runtime cannot run {graph.name}: {why(error)}; {REPORT}") from error


def check(plan: GraphPlan, precision: str, graph: Path, outputs: Outputs, references: Outputs) -> Figures:
    """Compare the outputs of ``graph``, which computes in ``precision``, with the module's.

    Raises:
        ExportError: when one misses its tolerance or is not finite.
    """
    figures, trouble = judge(precision, plan.outputs, outputs, references)
    if trouble is not None:
        advice = "export with --precision fp32" if precision == "float16" else REPORT
        raise ExportError(f"{graph.name} does not compute what the checkpoint does: it {trouble}; {advice}")
    return figures
