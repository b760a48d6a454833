"""A checkpoint, loaded: what every source is turned into before it is exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.clip import TextEncoder
from calotype.export.models.tiny_autoencoder import TinyAutoencoder
from calotype.export.models.unet import UNet
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Components as they are stored, and what the manifest needs to know of them.

    ``family`` is sd1, sd2 or sdxl, or vae for an autoencoder alone, which has no other component, no tokenizer and an
    empty ``scheduler``. ``sample_size`` is the latents' height and width that the UNet was trained with. ``source``
    says where the checkpoint came from: ``layout`` is diffusers or single-file.
    """

    family: str
    text_encoder: TextEncoder | None = None
    text_encoder_2: TextEncoder | None = None
    unet: UNet | None = None
    vae: Autoencoder | TinyAutoencoder
    tokenizer: Tokenizer | None = None
    tokenizer_2: Tokenizer | None = None
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sample_size: int | None = None
    force_zeros_for_empty_prompt: bool = False
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.unet is None:
            return
        config, latent = self.unet.config, self.vae.config.latent_channels
        if config.in_channels not in (latent, 2 * latent + 1):
            raise UnsupportedArchitectureError(
                f"the UNet reads {config.in_channels} channels beside an autoencoder of {latent}; "
                f"supported: {latent}, and {2 * latent + 1} for inpainting"
            )
        towers = [tower for tower in (self.text_encoder, self.text_encoder_2) if tower is not None]
        width = sum(tower.config.hidden_size for tower in towers)
        if config.cross_attention_dim != width:
            raise CheckpointError(
                f"the UNet reads text embeddings of width {config.cross_attention_dim}, "
                f"the text encoders give {width}; the components are of different models"
            )
