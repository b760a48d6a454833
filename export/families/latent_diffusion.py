"""What Stable Diffusion 1.x, 2.x and XL have in common: CLIP's text towers, a UNet, and an autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from calotype.export.checkpoint import Checkpoint
from calotype.export.components import load_autoencoder, load_text_encoder, load_unet
from calotype.export.folder import Folder
from calotype.export.graphs import text_encoder_plan, unet_plans, vae_plans, vae_spec
from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.clip import TextEncoder
from calotype.export.models.tiny_autoencoder import TinyAutoencoder
from calotype.export.models.unet import UNet
from calotype.export.prediction_type import ends_in_noise, stated_prediction_type
from calotype.export.single_file import SingleFile
from calotype.export.single_file_configs import unet_config
from calotype.export.single_file_keys import unet_table
from calotype.export.tokenizer import Tokenizer
from calotype.export.towers import Tower
from calotype.export.weights import load_module
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

# Latents whose noise goes from 1e-4 to nothing but noise in 1000 steps, as all were trained; each family adds the class
# that diffusers' copies of its models name.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
# What UNets read that are given more than latents; one with a mask and a masked picture, 9 channels, is supported.
OTHER_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler of pictures",
    8: "a model that edits or turns a picture by an instruction",
}
# What the schedulers of models are called that were trained on another noise than these families'.
OTHER_SCHEDULES = ("EDM", "FlowMatch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How the UNet reads one of its text encoders.

    Attributes:
        hidden_act: the activation of that tower, which no tensor tells.
        pad_token: what fills a prompt up.
        pooled: whether the UNet is given the pooled prompt too.
    """

    hidden_act: str
    pad_token: str
    pooled: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDiffusion:
    """One of these families, and what all its single files have in common that no tensor of theirs tells.

    Attributes:
        readers: one for each text encoder, in the order of the UNet's context.
        text_graph: what of a text encoder becomes a graph, given how many of its last layers are never read.
        heads: of every attention of the UNet; None means heads of 64 channels.
        unread_layers: how many of their last layers the text encoders never give to the UNet, where they are whole.
        scaling_factor: of the latents.
        sample_size: of the latents that the UNet was trained with.
        scheduler: its settings.
        zeros_for_empty_prompt: whether an empty negative prompt stands for zeros.
    """

    name: str
    known_as: str
    pipelines: tuple[str, ...]
    readers: tuple[Reader, ...]
    text_graph: Callable[[TextEncoder, int], nn.Module]
    heads: int | None
    unread_layers: int = 0
    scaling_factor: float
    sample_size: int
    scheduler: Mapping[str, Any]
    zeros_for_empty_prompt: bool = False

    @property
    def folders(self) -> tuple[str, ...]:
        """A text encoder and its tokenizer for each reader, and one of everything else."""
        return (*self.encoders, *self.tokenizers, "unet", "vae", "scheduler")

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return ("text_encoder", "text_encoder_2")[: len(self.readers)]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The names of the tokenizers, one for each text encoder."""
        return ("tokenizer", "tokenizer_2")[: len(self.readers)]

    def has_folder(self, folder: Folder) -> bool:
        """Every folder with one of its pipelines."""
        return not folder.alone

    def has_file(self, file: SingleFile) -> bool:
        """Whether the UNet has this family's marks."""
        raise NotImplementedError

    def load_folder(self, folder: Folder) -> Checkpoint:
        """Load a folder in diffusers' layout."""
        scheduler = folder.scheduler()
        kind = str(scheduler.get("_class_name"))
        if kind.startswith(OTHER_SCHEDULES):
            raise UnsupportedArchitectureError(
                f"{folder.path} names the scheduler {kind}, whose noise schedule the model was trained with, and which "
                "is not supported"
            )
        towers = [load_text_encoder(folder, name) for name in self.encoders]
        unet, sample_size = load_unet(folder)
        _check_input(unet.config.in_channels, str(folder.path))
        return self.checkpoint(
            towers=towers,
            tokenizers=[folder.tokenizer(name) for name in self.tokenizers],
            unet=unet,
            vae=load_autoencoder(folder),
            scheduler=scheduler,
            sample_size=sample_size,
            force_zeros_for_empty_prompt=bool(
                folder.index.get("force_zeros_for_empty_prompt", self.zeros_for_empty_prompt)
            ),
            card=folder.card,
            source=folder.source,
        )

    def load_file(self, file: SingleFile) -> Checkpoint:
        """Load an original file."""
        _check_input(file.unet.size("input_blocks.0.0.weight", 1), str(file.path))
        found = self._towers(file)
        file.check_strangers((file.unet, file.autoencoder), found)
        unread = [self.layers_unread(tower, reader) for tower, reader in zip(found, self.readers, strict=True)]
        towers = [
            tower.load(
                hidden_act=reader.hidden_act, layers=self.layers_read(tower, file), with_projection=reader.pooled
            )
            for tower, reader in zip(found, self.readers, strict=True)
        ]
        unet = self._unet(file, towers[-1])
        prediction = self.prediction_type(file, unet, towers[0])
        return self.checkpoint(
            towers=towers,
            unread=unread,
            tokenizers=[Tokenizer.clip(reader.pad_token) for reader in self.readers],
            unet=unet,
            vae=file.load_autoencoder(self.scaling_factor),
            scheduler={
                **self.scheduler,
                "prediction_type": prediction,
                "rescale_betas_zero_snr": ends_in_noise(file),
            },
            sample_size=self.trained_size(prediction),
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            card=file.card,
            source=file.source,
        )

    def layers_read(self, tower: Tower, file: SingleFile) -> int:
        """How many layers of a text encoder a bundle keeps: those whose output can be read."""
        return tower.layers

    def layers_unread(self, tower: Tower, reader: Reader) -> int:
        """How many of the last layers that a bundle keeps the UNet is never given; raises CheckpointError."""
        return self.unread_layers

    def prediction_type(self, file: SingleFile, unet: UNet, tower: TextEncoder) -> str:
        """What the UNet predicts: the noise, where nothing else is said."""
        return file.prediction_type or stated_prediction_type(file, "epsilon") or "epsilon"

    def trained_size(self, prediction_type: str) -> int:
        """The latents' height and width that the UNet was trained with."""
        return self.sample_size

    def checkpoint(
        self,
        *,
        towers: Sequence[TextEncoder],
        unread: Sequence[int] | None = None,
        tokenizers: Sequence[Tokenizer],
        unet: UNet,
        vae: Autoencoder | TinyAutoencoder,
        **fields: Any,
    ) -> Checkpoint:
        """The checkpoint of these components, with its graphs and further ``fields`` of it.

        ``unread`` is how many of its last layers each text encoder never gives to the UNet; None is ``unread_layers``.

        Raises:
            CheckpointError: the components are of different models.
            UnsupportedArchitectureError: the UNet reads something beside latents, a mask and a masked picture.
        """
        self._check_fit(towers, unet, vae.config.latent_channels)
        named = dict(zip(self.encoders, towers, strict=True))
        fitted = [tokenizer.fitted(tower) for tokenizer, tower in zip(tokenizers, towers, strict=True)]
        lengths = sorted({tokenizer.max_length for tokenizer in fitted})
        if len(lengths) > 1:
            raise CheckpointError(
                f"the text encoders read prompts of {' and '.join(map(str, lengths))} tokens, and the UNet reads them "
                "side by side; give both tokenizers the shorter model_max_length"
            )
        unread = [self.unread_layers] * len(towers) if unread is None else unread
        text = [
            text_encoder_plan(name, self.text_graph, tower, tokenizer, count)
            for (name, tower), tokenizer, count in zip(named.items(), fitted, unread, strict=True)
        ]
        return Checkpoint(
            family=self.name,
            components={**named, "unet": unet, "vae": vae},
            graphs=(*text, *unet_plans(unet), *vae_plans(vae)),
            tokenizers=dict(zip(self.tokenizers, fitted, strict=True)),
            vae=vae_spec(vae),
            max_clip_skip=min(plan.max_clip_skip for plan in text),
            **fields,
        )

    def _check_fit(self, towers: Sequence[TextEncoder], unet: UNet, latent: int) -> None:
        config, width = unet.config, sum(tower.config.hidden_size for tower in towers)
        if config.in_channels not in (latent, 2 * latent + 1):
            raise UnsupportedArchitectureError(
                f"the UNet reads {config.in_channels} channels beside an autoencoder of {latent}; "
                f"supported: {latent}, and {2 * latent + 1} for inpainting"
            )
        if config.cross_attention_dim != width:
            raise CheckpointError(
                f"the UNet reads text embeddings of width {config.cross_attention_dim}, "
                f"the text encoders give {width}; the components are of different models"
            )

    def _towers(self, file: SingleFile) -> list[Tower]:
        """As many text encoders as the family has readers."""
        found = file.towers
        if len(found) != len(self.readers):
            prefixes = ", ".join(tower.prefix for tower in found) or "none"
            raise CheckpointError(
                f"{file.path} holds a UNet of {self.known_as} without its text encoders: it reads {len(self.readers)}, "
                f"the file has {len(found)} ({prefixes}); fetch this model with its text encoders"
            )
        return found

    def _unet(self, file: SingleFile, last_tower: TextEncoder) -> UNet:
        part = file.averaged_unet() if file.ema else file.unet
        pooled_width = last_tower.config.projection_dim if self.readers[-1].pooled else None
        config = unet_config(part, heads=self.heads, pooled_width=pooled_width)
        return load_module(UNet, config, part, "UNet", unet_table(config))


def _check_input(channels: int, source: str) -> None:
    if channels in OTHER_INPUTS:
        raise UnsupportedArchitectureError(
            f"{source} holds {OTHER_INPUTS[channels]}, whose UNet reads {channels} channels of input; "
            "supported: 4, and 9 for inpainting"
        )
