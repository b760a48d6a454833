"""The tiny autoencoder (diffusers' ``AutoencoderTiny``): pixels and latents in a tenth of the time, a little blurred.

Bohan, "Tiny AutoEncoder for Stable Diffusion" (https://github.com/madebyollin/taesd).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig
from calotype.runtime.errors import UnsupportedArchitectureError

LOGVAR = -30.0  # where AutoencoderKL clamps its own: a posterior without spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyAutoencoderConfig(ModelConfig):
    """Diffusers' settings of an ``AutoencoderTiny``."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
    }
    # The last three serve diffusers' 8-bit previews of latents alone.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"block_out_channels", "force_upcast", "sample_size", "latent_magnitude", "latent_shift"}
    )

    def __post_init__(self) -> None:
        for half in ("encoder", "decoder"):
            channels, blocks = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            if len(channels) != len(blocks) or len(set(channels)) != 1:
                raise UnsupportedArchitectureError(
                    f"the tiny autoencoder's {half} has {half}_block_out_channels={channels} and "
                    f"num_{half}_blocks={blocks}; supported: equally many of each, and one number of channels"
                )

    @property
    def packed_channels(self) -> int:
        """Of the latents that graphs take and give."""
        return self.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels a latent spans in each direction."""
        return int(2 ** (len(self.num_encoder_blocks) - 1))


class Block(nn.Module):
    """Three 3×3 convolutions beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # At odd places diffusers has activations, which hold no parameters.
        self.conv = nn.Sequential(
            _conv(channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Half(nn.Module):
    """The encoder or the decoder, one sequence of layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyAutoencoder(nn.Module):
    """Encoder and decoder; latents here are on the UNet's own scale."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Half(_encoder_layers(config))
        self.decoder = Half(_decoder_layers(config))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in -1..1 to the mean and a constant log-variance, each (B, C, H/f, W/f)."""
        mean = self.encoder((image + 1) / 2)
        return mean, torch.full_like(mean, LOGVAR)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, h*f, w*f), about -1..1, not clipped."""
        return self.decoder(torch.tanh(latents / 3) * 3) * 2 - 1


def _encoder_layers(config: TinyAutoencoderConfig) -> list[nn.Module]:
    channels = config.encoder_block_out_channels[0]
    layers: list[nn.Module] = []
    for level, blocks in enumerate(config.num_encoder_blocks):
        layers.append(_conv(channels, channels, stride=2, bias=False) if level else _conv(config.in_channels, channels))
        layers += [Block(channels) for _ in range(blocks)]
    return [*layers, _conv(channels, config.latent_channels)]


def _decoder_layers(config: TinyAutoencoderConfig) -> list[nn.Module]:
    channels = config.decoder_block_out_channels[0]
    layers: list[nn.Module] = [_conv(config.latent_channels, channels), nn.ReLU()]
    for level, blocks in enumerate(config.num_decoder_blocks):
        layers += [Block(channels) for _ in range(blocks)]
        if level < len(config.num_decoder_blocks) - 1:
            layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), _conv(channels, channels, bias=False)]
    return [*layers, _conv(channels, config.out_channels)]


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
