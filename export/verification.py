"""A bundle's graphs against the checkpoint they were made from, as at the end of its export."""

from __future__ import annotations

from collections.abc import Iterator

from calotype.export.bundle import PRECISIONS
from calotype.export.graphs import by_component
from calotype.export.parity import check, run_graph, run_module
from calotype.export.precision import run_float16
from calotype.export.sources import load_checkpoint
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE
from calotype.runtime.bundle.parity import Figures
from calotype.runtime.errors import ExportError


def verify_against(bundle: Bundle, source: str) -> Iterator[tuple[str, Figures]]:
    """Compare every graph of ``bundle`` with its PyTorch module, filled from the checkpoint ``source``.

    Yields:
        What was compared, and how far apart it is at worst.

    Raises:
        ExportError: ``source`` is another model, a tolerance is missed, or a value is not finite.
        CheckpointError: ``source`` cannot be read.
    """
    manifest = bundle.manifest
    checkpoint = load_checkpoint(source, variant=manifest.source.get("variant"))
    networks = manifest.networks
    # An old bundle has not got the networks of today's exports that a pipeline can do without.
    made = {plan.network: plan for plan in checkpoint.graphs if plan.network in networks or plan.network not in ASIDE}
    specs = {name: plan.spec(tuple(networks[name].graphs)) for name, plan in made.items() if name in networks}
    if made.keys() != networks.keys() or specs != networks:
        raise ExportError(
            f"{source} does not have the networks of {bundle.path}; give the checkpoint it was exported from"
        )
    for component, own in by_component(made.values()).items():
        module = checkpoint.components[component]
        module.to(PRECISIONS[manifest.precision]).float()  # as the bundle stores the weights
        references = {plan.network: run_module(plan, plan.cases()) for plan in own}
        module.to("meta")  # its memory is ONNX Runtime's now
        for plan in own:
            network, tried = plan.network, plan.cases()
            graphs = {precision: bundle.path / path for precision, path in specs[network].graphs.items()}
            outputs = {"float32": run_graph(graphs["float32"], tried)}
            if "float16" in graphs:
                islands = manifest.parity[network]["float16"]["float32_islands"]
                outputs["float16"] = run_float16(graphs["float32"], islands, tried)
            for precision, got in outputs.items():
                figures = check(plan, precision, graphs[precision], got, references[network])
                yield f"{network}, {precision} against PyTorch", figures
