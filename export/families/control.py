"""A ControlNet, which is used beside a model of its family."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from torch import Tensor

from calotype.export.checkpoint import Checkpoint
from calotype.export.components import MODEL_WEIGHTS
from calotype.export.folder import Folder
from calotype.export.graphs import controlnet_plan
from calotype.export.models.controlnet import ControlNet, ControlNetConfig
from calotype.export.models.controlnet_union import ControlNetUnion, ControlNetUnionConfig
from calotype.export.single_file import SingleFile
from calotype.export.single_file_controlnet import (
    controlnet_config,
    controlnet_family,
    controlnet_part,
    controlnet_table,
)
from calotype.export.weights import load_module
from calotype.runtime.bundle.manifest import VaeSpec
from calotype.runtime.errors import InputError

logger = logging.getLogger(__name__)
CONTROLNETS = ("ControlNetModel", "ControlNetUnionModel")
# The latents' height and width that each family's models were trained with.
TRAINED_SIZES = {"sd1": 64, "sd2": 64, "sdxl": 128}
# What the settings beside an original file say, and the one published model that they say it of.
POOLED_SETTING, POOLED_NAME = "global_average_pooling: true", "shuffle"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetAlone:
    """Diffusers' folder of one of ``CONTROLNETS``, or a file of one in the original layout or diffusers'."""

    name: str = "control"
    known_as: str = "a ControlNet of theirs"
    pipelines: tuple[str, ...] = CONTROLNETS
    folders: tuple[str, ...] = ()

    def has_folder(self, folder: Folder) -> bool:
        """Every folder that says so."""
        return folder.alone

    def load_folder(self, folder: Folder) -> Checkpoint:
        """With the settings in its configuration."""
        config_class = ControlNetUnionConfig if folder.kind == CONTROLNETS[1] else ControlNetConfig
        config = config_class.from_json(folder.config("", CONTROLNETS))
        return _checkpoint(_loaded(config, folder.weights("", MODEL_WEIGHTS)), folder)

    def has_file(self, file: SingleFile) -> bool:
        """One with what reads a control picture; the original files have the model that it was trained beside, too."""
        return bool(controlnet_part(file)[0])

    def load_file(self, file: SingleFile) -> Checkpoint:
        """With settings that are read off its tensors."""
        if file.ema:
            raise InputError(f"{file.path} is a ControlNet, whose averaged weights are not read; export without --ema")
        part, original = controlnet_part(file)
        file.check_strangers((part, file.unet, file.autoencoder), file.towers)
        config = controlnet_config(part, original=original, pooled=_is_pooled(file))
        table = controlnet_table(config) if original else None
        return _checkpoint(_loaded(config, part, table), file)


def _loaded(
    config: ControlNetConfig, state: Mapping[str, Tensor], table: Mapping[str, str] | None = None
) -> ControlNet:
    if isinstance(config, ControlNetUnionConfig):
        return load_module(ControlNetUnion, config, state, "ControlNet", table)
    return load_module(ControlNet, config, state, "ControlNet", table)


def _checkpoint(controlnet: ControlNet, source: Folder | SingleFile) -> Checkpoint:
    config = controlnet.config
    family = controlnet_family(
        context=config.cross_attention_dim,
        linear=config.use_linear_projection,
        sizes=config.addition_embed_type is not None,
    )
    return Checkpoint(
        family=family,
        kind="control",
        components={"controlnet": controlnet},
        graphs=(controlnet_plan(controlnet),),
        vae=VaeSpec(scaling_factor=None, latent_channels=config.in_channels, downscale=config.downscale),
        sample_size=TRAINED_SIZES[family],
        card=source.card,
        source=source.source,
    )


def _is_pooled(file: SingleFile) -> bool:
    """Whether its residuals hold for every pixel, as those of the ControlNet that was taught shuffled pictures."""
    if file.settings_beside:
        return POOLED_SETTING in file.settings_beside.lower()
    pooled = POOLED_NAME in file.path.stem.lower()
    if pooled:
        logger.warning(
            "%s is by its name a ControlNet for shuffled pictures, and what it adds is averaged over the picture; if "
            "it is another, take shuffle out of the file's name",
            file.path.name,
        )
    return pooled


CONTROL = ControlNetAlone()
