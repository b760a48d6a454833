"""FLUX.2's autoencoder (diffusers' ``AutoencoderKLFlux2``): patches of 2 × 2 latents, normed by batch statistics.

What graphs take and give are the transformer's latents: patches side by side as channels, of zero mean and unit
variance. Of a picture's posterior only the mean is ever used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder
from calotype.export.models.tiny_autoencoder import LOGVAR

PATCH = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2AutoencoderConfig(AutoencoderConfig):
    """Diffusers' settings of an ``AutoencoderKLFlux2``; its latents' scale is in the weights."""

    latent_channels: int = 32
    scaling_factor: float | None = 1.0
    batch_norm_eps: float = 1e-4
    decoder_block_out_channels: tuple[int, ...] | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**AutoencoderConfig.neutral, "patch_size": ((PATCH, PATCH),)}
    ignored: ClassVar[frozenset[str]] = AutoencoderConfig.ignored | {"batch_norm_momentum"}

    @property
    def packed_channels(self) -> int:
        """See :attr:`AutoencoderConfig.packed_channels`."""
        return self.latent_channels * PATCH**2

    @property
    def downscale(self) -> int:
        """Pixels a packed latent spans in each direction."""
        return PATCH * super().downscale


class Statistics(nn.Module):
    """Mean and variance of each packed channel."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.running_mean = nn.Parameter(torch.zeros(channels))
        self.running_var = nn.Parameter(torch.ones(channels))

    @property
    def mean(self) -> Tensor:
        """(C, 1, 1)."""
        return self.running_mean[:, None, None]

    @property
    def deviation(self) -> Tensor:
        """(C, 1, 1)."""
        return torch.sqrt(self.running_var + self.eps)[:, None, None]


class Flux2Autoencoder(Autoencoder):
    """An :class:`Autoencoder` between pixels and the transformer's latents; its decoder may be a smaller one."""

    def __init__(self, config: Flux2AutoencoderConfig) -> None:
        super().__init__(config)
        if config.decoder_block_out_channels is not None:
            self.decoder = Decoder(dataclasses.replace(config, block_out_channels=config.decoder_block_out_channels))
        self.bn = Statistics(config.packed_channels, config.batch_norm_eps)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in -1..1 to the mean and a constant log-variance, each (B, 4 C, H/2f, W/2f)."""
        mean, _ = super().encode(image)
        packed = (F.pixel_unshuffle(mean, PATCH) - self.bn.mean) / self.bn.deviation
        return packed, torch.full_like(packed, LOGVAR)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4 C, h, w) to pixels (B, 3, 2f*h, 2f*w), about -1..1, not clipped."""
        return super().decode(F.pixel_shuffle(latents * self.bn.deviation + self.bn.mean, PATCH))
