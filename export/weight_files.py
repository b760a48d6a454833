"""Which files of a component's folder hold its weights."""

from __future__ import annotations

import json
from pathlib import Path

from calotype.runtime.errors import CheckpointError


def weight_names(stem: str) -> tuple[str, ...]:
    """The files that can hold a component's weights, or name the shards that do, the best first."""
    return (
        f"{stem}.safetensors.index.json",
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors",
    )


def shards(index: Path) -> list[Path]:
    """The files that a shard index names, which lie beside it.

    Raises:
        CheckpointError: when it is no such index, or names files elsewhere.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error}; download it again") from error
    strangers = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if strangers:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(strangers[:8])}; do not use it")
    return sorted(index.parent / name for name in names)
