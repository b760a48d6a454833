"""The KL autoencoder between pixels and latents (diffusers' ``AutoencoderKL``).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig, check_divides
from calotype.export.models.layers import Attention, Downsample, ImagePrompted, ResnetBlock, Upsample

EPS = 1e-6  # of every group norm in this model


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(ModelConfig):
    """Diffusers' settings of an ``AutoencoderKL``."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float | None = 0.18215  # None is not known
    shift_factor: float | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    # force_upcast says that fp16 overflows in this VAE. Exports measure that instead of believing it.
    ignored: ClassVar[frozenset[str]] = frozenset({"sample_size", "force_upcast", "down_block_types", "up_block_types"})

    def __post_init__(self) -> None:
        check_divides("the autoencoder's norm_num_groups", self.norm_num_groups, self.block_out_channels)

    @property
    def packed_channels(self) -> int:
        """Of the latents that graphs take and give."""
        return self.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels such a latent spans in each direction."""
        return int(2 ** (len(self.block_out_channels) - 1))


class Stage(nn.Module):
    """Resnets at one resolution, then a change of resolution or none."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, resample: str | None, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(in_channels if layer == 0 else out_channels, out_channels, groups) for layer in range(layers)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            x = self.downsamplers[0](x)
        if self.resample == "up":
            x = self.upsamplers[0](x)
        return x


class PixelAttention(Attention):
    """Single-head self-attention over all pixels of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor, context: Tensor | ImagePrompted | None = None) -> Tensor:
        # (B, C, H, W) -> (B, C, H, W)
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, (x.shape[-2], x.shape[-1]))


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(channels[max(i - 1, 0)], out, config.layers_per_block, "down" if i < last else None, groups)
            for i, out in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        # (B, 3, H, W) -> (B, 2 * latent_channels, H/f, W/f)
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = tuple(reversed(config.block_out_channels)), config.norm_num_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Stage(channels[max(i - 1, 0)], out, config.layers_per_block + 1, "up" if i < last else None, groups)
            for i, out in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        # (B, latent_channels, h, w) -> (B, 3, h*f, w*f)
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Autoencoder(nn.Module):
    """Encoder, decoder and the 1×1 convolutions between them; latents here are not yet scaled."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in -1..1 to mean and log-variance of the posterior, each (B, C, H/f, W/f)."""
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) to pixels (B, 3, h*f, w*f), about -1..1, not clipped."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        out: Tensor = self.decoder(latents)
        return out


def _resnet(in_channels: int, out_channels: int, groups: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=groups, eps=EPS, time_embed_dim=None)
