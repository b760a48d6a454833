"""Checkpoints in diffusers' layout: ``model_index.json`` and a folder for each component, or one component alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from calotype.export.json_files import read_json
from calotype.export.tokenizer import Tokenizer
from calotype.export.weight_files import STEMS, read_component, variants
from calotype.runtime.errors import InputError, UnsupportedArchitectureError

INDEX = "model_index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder, whose components its family reads.

    Attributes:
        path: the folder.
        index: its ``model_index.json``, or the ``config.json`` of a component alone.
        alone: whether it is a component alone.
        variant: which variant of the weights is taken where a component has it.
        transformer: a file whose tensors take the place of those of the transformer; None is the folder's own.
    """

    path: Path
    index: Mapping[str, Any]
    alone: bool
    variant: str | None = None
    transformer: Path | None = None

    @classmethod
    def open(cls, path: Path, variant: str | None = None, transformer: Path | None = None) -> Self:
        """Read what the folder says that it is.

        Raises:
            CheckpointError: it says nothing, or nothing that can be read.
            InputError: it has no weights of that variant.
        """
        alone = not (path / INDEX).exists() and (path / "config.json").exists()
        index = read_json(path / ("config.json" if alone else INDEX))
        there = sorted(
            {name for folder in (path, *path.glob("*/")) for stem in STEMS for name in variants(folder, stem)}
        )
        if variant is not None and variant not in there:
            raise InputError(f"{path} has no weights of the variant {variant!r}; it has {', '.join(there) or 'none'}")
        if transformer is not None and "transformer" not in index:
            raise InputError(f"{path} has no transformer that another could take the place of; leave it out")
        return cls(path=path, index=index, alone=alone, variant=variant, transformer=transformer)

    @property
    def kind(self) -> str | None:
        """The class that the folder says it holds, a pipeline's or a component's."""
        return _class_name(self.index)

    @property
    def card(self) -> Mapping[str, Any]:
        """What ``model_card.json`` says, which is no part of diffusers' layout."""
        card = self.path / "model_card.json"
        return read_json(card) if card.exists() else {}

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the checkpoint comes from, for the manifest."""
        chosen = {} if self.variant is None else {"variant": self.variant}
        chosen |= {} if self.transformer is None else {"transformer": self.transformer.name}
        return {"layout": "diffusers", "name": self.path.resolve().name, **chosen}

    def scheduler(self) -> dict[str, Any]:
        """The settings of the scheduler."""
        return read_json(self.path / "scheduler" / "scheduler_config.json")

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer in the folder ``name``."""
        return Tokenizer.from_folder(self.path / name)

    def config(self, name: str, supported: tuple[str, ...]) -> dict[str, Any]:
        """The configuration of the component ``name``; one that names no class is taken for the first ``supported``.

        Raises:
            UnsupportedArchitectureError: it names another class.
        """
        folder = self.path / name
        config = read_json(folder / "config.json")
        found = _class_name(config) or supported[0]
        if found not in supported:
            raise UnsupportedArchitectureError(
                f"{folder} holds a {found}, which is not supported; supported: {', '.join(supported)}"
            )
        return config

    def weights(self, name: str, stem: str) -> dict[str, Tensor]:
        """The weights of the component ``name``, in ``<stem>.safetensors`` or its shards."""
        return read_component(self.path / name, stem, self.variant)


def _class_name(config: Mapping[str, Any]) -> str | None:
    found = config.get("_class_name", (config.get("architectures") or [None])[0])
    return None if found is None else str(found)
