"""The kinds of changes that are read, and what their tensors are called once the layouts' names are off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from calotype.runtime.adapters.boft import InputBOFT, OutputBOFT
from calotype.runtime.adapters.changes import Change, Difference, Module
from calotype.runtime.adapters.dora import DoRA
from calotype.runtime.adapters.full import Full, Replacement
from calotype.runtime.adapters.loha import LoHa
from calotype.runtime.adapters.lokr import LoKr
from calotype.runtime.adapters.low_rank import LowRank
from calotype.runtime.adapters.oft import InputOFT, OutputOFT


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of change: a module that has one of ``parts`` has it, and ``parameter`` is what it changes there."""

    parts: tuple[str, ...]
    parameter: str
    read: Callable[[Module, float], Change]


def changes(module: Module) -> list[tuple[str, Change]]:
    """What a file does to a module's "weight" and "bias".

    Raises:
        KeyError: a tensor is not there that belongs to another.
        ValueError, OverflowError: a factor is no number that can be used.
    """
    parts = module.parts.keys()
    found: list[tuple[str, Change]] = [
        ("weight", _decomposed(module, read)) for own, read in DIFFERENCES.items() if not parts.isdisjoint(own)
    ]
    if not found and not parts.isdisjoint(("dora_scale", "magnitude")):
        raise KeyError("a direction")
    found += [(kind.parameter, kind.read(module, module.scale)) for kind in KINDS if not parts.isdisjoint(kind.parts)]
    if not found:
        raise KeyError("anything but a factor")
    return found


def _decomposed(module: Module, read: Callable[[Module, float], Difference]) -> Change:
    if "dora_scale" in module.parts:
        return DoRA(change=read(module, 1.0), magnitude=module.parts["dora_scale"], scale=module.scale)
    change = read(module, module.scale)
    if "magnitude" in module.parts:
        return DoRA(change=change, magnitude=module.parts["magnitude"], scale=1.0)
    return change


def _output_rotation(module: Module, scale: float) -> Change:
    parts = module.parts
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    limit = float(parts["alpha"].item()) if "alpha" in parts else 0.0
    kind = OutputBOFT if blocks.ndim == 4 else OutputOFT
    return kind(blocks=blocks, rescale=rescale, limit=limit, scale=scale)


def _added(part: str) -> Callable[[Module, float], Change]:
    return lambda module, scale: Full(value=module.parts[part], factor=scale)


def _added_by_up(module: Module, scale: float) -> Change:
    rank = max(module.parts["down"].shape[:1], default=1)
    return Full(value=module.parts["up_bias"], factor=scale * module.factor(rank))


def _replaced(part: str) -> Callable[[Module, float], Change]:
    return lambda module, scale: Replacement(value=module.parts[part], scale=scale)


# What is added, and can be made as long as DoRA has it.
DIFFERENCES: dict[tuple[str, ...], Callable[[Module, float], Difference]] = {
    ("down", "up", "mid", "embedding_down", "embedding_up"): LowRank.read,
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"): LoHa.read,
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"): LoKr.read,
}
KINDS = (
    Kind(("up_bias",), "bias", _added_by_up),
    Kind(("diff",), "weight", _added("diff")),
    Kind(("diff_b",), "bias", _added("diff_b")),
    Kind(("w_norm",), "weight", _added("w_norm")),
    Kind(("b_norm",), "bias", _added("b_norm")),
    Kind(("oft_blocks", "rescale"), "weight", _output_rotation),
    Kind(("oft_R",), "weight", InputOFT.read),
    Kind(("boft_R", "boft_s"), "weight", InputBOFT.read),
    Kind(("value",), "weight", _replaced("value")),
    Kind(("value_bias",), "bias", _replaced("value_bias")),
)
