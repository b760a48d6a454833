"""What each network of a bundle takes of a GPU's memory, as far as that is known before it runs."""

from __future__ import annotations

import dataclasses

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import default_form
from calotype.runtime.bundle.manifest import ASIDE
from calotype.runtime.graphs.files import weight_bytes
from calotype.runtime.sessions.plans import sound_records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Of one network, in bytes.

    Attributes:
        network: its name.
        precision: of the graph that a GPU runs.
        weights: that this graph reads.
        activations: at the largest shape of the plan here that takes most, as its builder says; None where none is.
    """

    network: str
    precision: str
    weights: int
    activations: int | None


def needs(bundle: Bundle) -> list[Need]:
    """Of all networks but those of deep-feature caching."""
    records = [record for _, record in sound_records()]
    found = []
    for network, spec in bundle.manifest.networks.items():
        if network in ASIDE:
            continue
        precision = str(default_form(spec, "cuda"))
        graph = spec.graphs[precision]
        sha256 = bundle.manifest.files[graph].sha256
        plans = [record for record in records if record.key["graph"] == sha256]
        activations = [record.figures["activations"] for record in plans if "activations" in record.figures]
        found.append(
            Need(
                network=network,
                precision=precision,
                weights=weight_bytes(bundle.path / graph),
                activations=int(max(activations)) if activations else None,
            )
        )
    return found


def most(found: list[Need], *, low_memory: bool) -> int:
    """Bytes that are taken at once: all weights and the largest activations, or those of one network at a time."""
    if low_memory:
        return max(need.weights + (need.activations or 0) for need in found)
    return sum(need.weights for need in found) + max(need.activations or 0 for need in found)
