"""Which files of a component's folder hold its weights, and which variant of them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import Tensor

from calotype.export.contents import read_tensors
from calotype.export.json_files import read_json
from calotype.export.weights import listed
from calotype.runtime.errors import CheckpointError

logger = logging.getLogger(__name__)

# The variant that is taken where there is no plain one, without a word: the same numbers, rounded.
HALF = "fp16"
# What the weights' files are called, transformers' and diffusers'.
STEMS = ("model", "diffusion_pytorch_model")
PICKLED = "pytorch_model"  # transformers', before there were safetensors


def weight_names(stem: str, variant: str | None = None) -> tuple[str, ...]:
    """The files that can hold a component's weights, or name the shards that do, the best first."""
    if variant is None:
        return (f"{stem}.safetensors.index.json", f"{stem}.safetensors", *weight_names(stem, HALF))
    return (
        # Two places where versions of diffusers have put it, and that of transformers.
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.safetensors.{variant}.index.json",
        f"{stem}.{variant}.safetensors.index.json",
        f"{stem}.{variant}.safetensors",
    )


def pickle_names(stem: str, variant: str | None = None) -> tuple[str, ...]:
    """The same of weights that are read as safetensors are, without running what a pickle could hold."""
    if variant is None:
        plain = (f"{name}.bin{end}" for name in (stem, PICKLED) for end in (".index.json", ""))
        return (*plain, *pickle_names(stem, HALF))
    names = ("{}.bin.index.{}.json", "{}.{}.bin")
    return tuple(name.format(own, variant) for own in (stem, PICKLED) for name in names)


def read_component(folder: Path, stem: str, variant: str | None = None) -> dict[str, Tensor]:
    """The state dict of a component, in one file or in shards.

    Args:
        folder: where it lies.
        stem: what its files' names begin with.
        variant: which of several; one that this component has not got is passed over for the plain one.

    Raises:
        CheckpointError: there is none, or several and none was chosen, or it is truncated or something else.
    """
    first = _first(folder, stem, variant)
    state: dict[str, Tensor] = {}
    for path in shards(first) if first.suffix == ".json" else [first]:
        state |= read_tensors(path)[0]
    return state


def variants(folder: Path, stem: str) -> list[str]:
    """The variants of a component that a folder has."""
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.safetensors\.index\.([\w-]+)\.json|\.safetensors\.([\w-]+)\.index\.json"
        rf"|\.([\w-]+)\.safetensors(?:\.index\.json)?)"
        rf"|(?:{re.escape(stem)}|{PICKLED})\.(?:bin\.index\.([\w-]+)\.json|([\w-]+)\.bin)"
    )
    found = {match[match.lastindex or 0] for path in folder.glob("*") if (match := pattern.fullmatch(path.name))}
    return sorted(name for name in found if not re.fullmatch(r"(.+-)?\d{5}-of-\d{5}", name))


def shards(index: Path) -> list[Path]:
    """The files that a shard index names, which lie beside it.

    Raises:
        CheckpointError: when it is no such index, or names files elsewhere.
    """
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError):
        message = f"{index} is not an index of weights: it has no table weight_map; download it again"
        raise CheckpointError(message) from None
    strangers = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    if strangers:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(strangers[:8])}; do not use it")
    return sorted(index.parent / name for name in names)


def _first(folder: Path, stem: str, variant: str | None) -> Path:
    chosen = () if variant is None else (*weight_names(stem, variant), *pickle_names(stem, variant))
    names = (*chosen, *weight_names(stem), *pickle_names(stem))
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is not None:
        return found
    there = variants(folder, stem)
    if len(there) > 1:
        raise CheckpointError(
            f"{folder} has no {stem}.safetensors, but the variants {', '.join(there)}; choose one with --variant"
        )
    if there:
        logger.warning("%s has no %s.safetensors; its only variant, %s, is taken", folder, stem, there[0])
        return _first(folder, stem, there[0])
    has = listed(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise CheckpointError(f"{folder} has no {stem}.safetensors; it has {has}: fetch this model's weights")
