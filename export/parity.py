"""Does a graph compute what its PyTorch module computes? Each runs on random and on edge inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calotype.export.graphs import GraphPlan, example_inputs
from calotype.runtime.errors import ExportError

TOLERANCE = 1e-4  # largest error over largest magnitude, float32


def check(plan: GraphPlan, graph: Path) -> dict[str, Any]:
    """Compare on the CPU; the report has the largest absolute and relative error and the smallest cosine.

    Raises:
        ExportError: when the graph misses the tolerance or gives a value that is not finite.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    report = {"max_absolute": 0.0, "max_relative": 0.0, "min_cosine": 1.0}
    for case, inputs in _cases(plan).items():
        with torch.no_grad():
            expected = plan.module(*inputs)
        if isinstance(expected, Tensor):
            expected = (expected,)
        feeds = {spec.name: tensor.numpy() for spec, tensor in zip(plan.inputs, inputs, strict=True)}
        for spec, wanted, got in zip(plan.outputs, expected, session.run(None, feeds), strict=True):
            reference = wanted.numpy().astype(np.float64)
            if not np.isfinite(got).all():
                raise ExportError(f"{graph.name} gives values that are not finite in {spec.name!r} on {case} inputs")
            largest = float(np.abs(reference - got).max())
            relative = largest / max(float(np.abs(reference).max()), 1e-12)
            norms = float(np.linalg.norm(reference) * np.linalg.norm(got)) or 1.0
            report["max_absolute"] = max(report["max_absolute"], largest)
            report["max_relative"] = max(report["max_relative"], relative)
            report["min_cosine"] = min(report["min_cosine"], float(np.vdot(reference, got)) / norms)
            if relative > TOLERANCE:
                raise ExportError(
                    f"{graph.name} is off by {relative:.1e} in {spec.name!r} on {case} inputs; "
                    f"{TOLERANCE:.0e} is allowed"
                )
    return report


def _cases(plan: GraphPlan) -> dict[str, tuple[Tensor, ...]]:
    """Sizes other than those traced with; for the UNet both ends of the schedule (the timestep is 0 to 999)."""
    sizes = {"batch": 1, "rows": 3, "tokens": 11, "height": 16, "width": 8}
    random = example_inputs(plan, sizes, seed=1)
    cases = {"random": random}
    large = tuple(
        tensor * 10 if tensor.is_floating_point() and spec.name in ("sample", "latents") else tensor
        for spec, tensor in zip(plan.inputs, random, strict=True)
    )
    if plan.network in ("unet", "vae_decoder"):
        cases["large"] = large
    if plan.network == "text_encoder":
        ids = random[0]
        cases["all-padding"] = (torch.full_like(ids, int(ids.max())), random[1])
        cases["clip-skip"] = (ids, torch.ones_like(random[1]))
    return cases
