"""Operations of a network, counted from the module that its graph is traced from."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from calotype.export.graphs import GraphPlan


def operations(plan: GraphPlan, sizes: dict[str, int]) -> float:
    """Of one run at ``sizes``; a multiplication with its addition counts as two."""
    return float(counted(plan, sizes).get_total_flops())


def counted(plan: GraphPlan, sizes: dict[str, int]) -> FlopCounterMode:
    """The operations of a plan whose module has no memory (device "meta"), module by module."""
    inputs = {spec.name: torch.zeros(spec.resolve(sizes), device="meta") for spec in plan.inputs}
    with FlopCounterMode(display=False, depth=12) as counter, torch.no_grad():
        plan.module(**inputs)
    return counter
