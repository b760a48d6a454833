"""The building blocks that UNet and autoencoder share, with the parameter names of diffusers' checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Two normalised 3×3 convolutions around a skip; the UNet's also add a projected time embedding."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_embed_dim: int | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_embed_dim is None else nn.Linear(time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        # x (B, Cin, H, W), time_embedding (B, T) -> (B, Cout, H, W)
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time_embedding is not None:
            hidden = hidden + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePrompted:
    """A UNet's context with image prompts: what its cross-attentions read beside the text.

    Attributes:
        text: (B, M, D).
        images: for each cross-attention, in the order in which they are computed, keys and values of A groups of N
            image tokens, (B, A, N, C) each; each group is attended to by itself, and what comes out is added up.
        bias: (B, A, N), what is added to the tokens' scores: far below zero for one that is none.
    """

    text: Tensor
    images: Iterator[tuple[Tensor, Tensor]]
    bias: Tensor


class Attention(nn.Module):
    """Multi-head attention over (B, N, C) tokens; ``context`` gives keys and values in cross-attention."""

    def __init__(
        self, dim: int, *, heads: int, context_dim: int | None = None, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | ImagePrompted | None = None) -> Tensor:
        # x (B, N, C), context (B, M, D) -> (B, N, C)
        prompted = context if isinstance(context, ImagePrompted) else None
        read = x if context is None else context if isinstance(context, Tensor) else context.text
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(read), self.to_v(read))
        )
        if self.upcast:
            query, key, value = query.float(), key.float(), value.float()
        # (B, heads, N, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value).to(x.dtype)
        if prompted is not None:
            attended = attended + self._attended_images(query, prompted).to(x.dtype)
        out: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return out

    def _attended_images(self, query: Tensor, prompted: ImagePrompted) -> Tensor:
        # (B, heads, N, C / heads) -> the same
        key, value = (one.unflatten(-1, (self.heads, -1)).transpose(2, 3) for one in next(prompted.images))
        bias = prompted.bias[:, :, None, None]  # (B, A, 1, 1, N)
        return F.scaled_dot_product_attention(
            query[:, None].expand(-1, key.shape[1], -1, -1, -1), key, value, bias
        ).sum(1)


class Downsample(nn.Module):
    """A strided 3×3 convolution. The autoencoder pads right and bottom only (padding 0), the UNet all around."""

    def __init__(self, channels: int, *, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        # (B, C, H, W) -> (B, C, H/2, W/2)
        out: Tensor = self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution; ``size`` makes odd skip sizes fit."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        # (B, C, H, W) -> (B, C, 2H, 2W), or (B, C, *size)
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        out: Tensor = self.conv(x)
        return out


def sinusoidal_embedding(timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal position embedding of ``timesteps`` (B,) into float32 (B, ``dim``); Vaswani et al. 2017."""
    half = dim // 2
    # In diffusers' order: at a timestep of 999 another rounding of the frequencies moves the angles by 1e-4.
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * -math.log(10000) / (half - freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(exponent)[None]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU; ``cond_proj`` adds LCM's guidance embedding to the input."""

    def __init__(self, in_dim: int, out_dim: int, *, cond_dim: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim, bias=bias)
        self.linear_2 = nn.Linear(out_dim, out_dim, bias=bias)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_dim, bias=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        # x (B, in_dim), condition (B, cond_dim) -> (B, out_dim)
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out
