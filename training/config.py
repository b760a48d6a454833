"""Every hyper-parameter, once. Change one here and the stages that depend on it are trained again by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from calotype.export.models.autoencoder import AutoencoderConfig
from calotype.export.models.clip import TextEncoderConfig
from calotype.export.models.unet import UNetConfig

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "names": "emojibase-data@17.0.0",
}
STYLES = ("noto", "twemoji", "fluent")
CONTEXT_LENGTH = 32
VOCAB_SIZE = 2048

AUTOENCODER = AutoencoderConfig(
    latent_channels=16,
    block_out_channels=(24, 48, 96, 160),
    layers_per_block=1,
    norm_num_groups=8,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.0,
)
UNET = UNetConfig(
    in_channels=16,
    out_channels=16,
    block_out_channels=(96, 192),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(4, 8),
    cross_attention_dim=192,
    use_linear_projection=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a stage trains: ``steps``, or until ``minutes`` of wall time are spent if that is sooner.

    The first step after a start, in which a network is compiled, takes none of the minutes.
    """

    steps: int
    minutes: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one run, which lives in the folder ``work``.

    ``start`` is a bundle whose weights the networks begin with where they have no checkpoint yet; None begins anew.
    """

    work: Path
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = False
    compile: bool = False
    start: Path | None = None
    image_size: int = 64
    groups: tuple[int, ...] = (0, 3, 4)  # emojibase: smileys, animals and nature, food and drink
    # The autoencoder learns from more pictures than the UNet draws: objects, people, places and symbols too.
    autoencoder_groups: tuple[int, ...] = (0, 1, 3, 4, 5, 6, 7, 8)
    autoencoder_budget: Budget = Budget(steps=8000)
    autoencoder_batch: int = 32
    autoencoder_crop: int = 32
    autoencoder_lr: float = 1.5e-3
    kl_weight: float = 1e-6
    text_budget: Budget = Budget(steps=1000)
    text_batch: int = 128
    text_lr: float = 1e-3
    unet_budget: Budget = Budget(steps=6000)
    unet_batch: int = 64
    unet_lr: float = 1e-3
    # None leaves the text encoder as its contrastive training left it; a rate trains it along with the UNet.
    text_along_lr: float | None = 1e-4
    colours_budget: Budget = Budget(steps=800)
    colours_batch: int = 64
    colours_lr: float = 1e-3
    colours_from: int = 300  # the least timestep
    # How much the states of captions without a colour count, in shares of their variance, beside the UNet's loss.
    colours_keep: float = 1.0
    synonyms_budget: Budget = Budget(steps=1500)
    synonyms_batch: int = 48
    synonyms_lr: float = 1e-3
    # How much more a caption counts that is to keep its states than one that is to get those of a name.
    synonyms_keep: float = 2.0
    finetune_budget: Budget = Budget(steps=1500)
    finetune_batch: int = 64
    finetune_lr: float = 3e-4
    finetune_text_lr: float = 1e-4
    # A round each: how far from the weights before it to those it left the next begins, or the bundled ones lie.
    finetune_shares: tuple[float, ...] = (0.6, 1.0)
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    checkpoint_minutes: float = 2.0
    autoencoder: AutoencoderConfig = AUTOENCODER
    unet: UNetConfig = UNET

    @property
    def text_encoder(self) -> TextEncoderConfig:
        """The text tower; the tokenizer puts its two special tokens last."""
        return TextEncoderConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            hidden_act="quick_gelu",
            projection_dim=192,
            eos_token_id=VOCAB_SIZE - 1,
        )

    def autocast(self) -> torch.autocast:
        """The precision that forward passes run in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)


CPU = TrainingConfig(work=Path(".work/cpu"), bfloat16=True)
GPU = dataclasses.replace(
    CPU,
    work=Path(".work/gpu"),
    device="cuda",
    compile=True,
    image_size=128,
    groups=(0, 1, 3, 4, 5, 6, 7, 8),
    autoencoder_crop=64,
    autoencoder_batch=128,
    unet_batch=512,
    autoencoder_budget=Budget(steps=20_000, minutes=2.6),
    text_budget=Budget(steps=4000, minutes=1.5),
    unet_budget=Budget(steps=20_000, minutes=5.6),
)
# The run that the bundled model comes from.
TALBOT = GPU
