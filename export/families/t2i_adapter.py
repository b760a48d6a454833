"""A T2I-Adapter, which is used beside a model of its family."""

from __future__ import annotations

import dataclasses

from calotype.export.checkpoint import Checkpoint
from calotype.export.components import MODEL_WEIGHTS
from calotype.export.families.control import TRAINED_SIZES
from calotype.export.folder import Folder
from calotype.export.graphs import t2i_adapter_plan
from calotype.export.models.t2i_adapter import FULL_XL, T2IAdapter, T2IAdapterConfig
from calotype.export.single_file import SingleFile
from calotype.export.single_file_t2i_adapter import t2i_adapter_config, t2i_adapter_part, t2i_adapter_table
from calotype.export.weights import load_module
from calotype.runtime.bundle.manifest import VaeSpec
from calotype.runtime.errors import InputError

T2I_ADAPTERS = ("T2IAdapter",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T2IAdapterAlone:
    """Diffusers' folder of one ``T2IAdapter``, or a file of one in the original layout or diffusers'."""

    name: str = "t2i_adapter"
    known_as: str = "a T2I-Adapter of theirs"
    pipelines: tuple[str, ...] = T2I_ADAPTERS
    folders: tuple[str, ...] = ()

    def has_folder(self, folder: Folder) -> bool:
        """Every folder that says so."""
        return folder.alone

    def load_folder(self, folder: Folder) -> Checkpoint:
        """With the settings in its configuration."""
        config = T2IAdapterConfig.from_json(folder.config("", T2I_ADAPTERS))
        return _checkpoint(load_module(T2IAdapter, config, folder.weights("", MODEL_WEIGHTS), "T2I-Adapter"), folder)

    def has_file(self, file: SingleFile) -> bool:
        """One with the resnets of an adapter."""
        return bool(t2i_adapter_part(file)[0])

    def load_file(self, file: SingleFile) -> Checkpoint:
        """With settings that are read off its tensors."""
        if file.ema:
            raise InputError(f"{file.path} is a T2I-Adapter, whose averaged weights are not read; export without --ema")
        part, original = t2i_adapter_part(file)
        file.check_strangers((part,))
        config = t2i_adapter_config(part, original=original)
        table = t2i_adapter_table(config) if original else None
        return _checkpoint(load_module(T2IAdapter, config, part, "T2I-Adapter", table), file)


def _checkpoint(adapter: T2IAdapter, source: Folder | SingleFile) -> Checkpoint:
    config = adapter.config
    family = "sdxl" if config.adapter_type == FULL_XL else "sd1"
    return Checkpoint(
        family=family,
        kind="control",
        components={"t2i_adapter": adapter},
        graphs=(t2i_adapter_plan(adapter),),
        vae=VaeSpec(scaling_factor=None, downscale=config.downscale),
        sample_size=TRAINED_SIZES[family],
        card=source.card,
        source=source.source,
    )


T2I_ADAPTER = T2IAdapterAlone()
