"""An IP-Adapter: what an image encoder made of a picture to keys and values for every cross-attention of a UNet.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (arXiv
2308.06721). Names are those of the published files.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig

HEAD = 64  # channels of a resampler's attention head, in every published file


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPAdapterConfig(ModelConfig):
    """What its tensors tell.

    Attributes:
        kind: ``plain`` projects one embedding of a picture to a few tokens; ``plus`` resamples the embeddings of its
            parts into some; ``full`` projects each of those.
        image_dim: the width of what the image encoder gives.
        cross_attention_dim: the width of a token, which is that of the UNet's text embeddings.
        layers: channels of each cross-attention, in the order of the file.
        tokens: how many the picture becomes; with ``full``, as many as it has parts.
        width: the resampler's.
        heads: the resampler's.
        depth: the resampler's layers.
        hidden: the resampler's feed-forward layer's channels.
    """

    kind: str
    image_dim: int
    cross_attention_dim: int
    layers: tuple[int, ...]
    tokens: int = 4
    width: int = 0
    heads: int = 0
    depth: int = 0
    hidden: int = 0


class PlainProjection(nn.Module):
    """One embedding to ``tokens`` of them."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.image_dim, config.tokens * config.cross_attention_dim)
        self.norm = nn.LayerNorm(config.cross_attention_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        # (B, E) -> (B, tokens, D)
        out: Tensor = self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))
        return out


class FullProjection(nn.Module):
    """Each part of a picture to a token, through a layer of its own width."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        narrow, wide = config.image_dim, config.cross_attention_dim
        self.proj = nn.Sequential(nn.Linear(narrow, narrow), nn.GELU(), nn.Linear(narrow, wide), nn.LayerNorm(wide))

    def forward(self, embedding: Tensor) -> Tensor:
        # (B, T, E) -> (B, T, D)
        out: Tensor = self.proj(embedding)
        return out


class ResamplerAttention(nn.Module):
    """Attention of learned queries to a picture's parts and to themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        inner = heads * HEAD
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        # (B, T, C), (B, tokens, C) -> (B, tokens, C)
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.to_q(latents), key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class ResamplerLayer(nn.ModuleList):
    """Attention, 0, and a feed-forward layer, 1, each around a skip."""

    def __init__(self, config: IPAdapterConfig) -> None:
        width, hidden = config.width, config.hidden
        super().__init__(
            [
                ResamplerAttention(width, config.heads),
                nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(),
                    nn.Linear(hidden, width, bias=False),
                ),
            ]
        )  # fmt: skip

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        # (B, T, C), (B, tokens, C) -> (B, tokens, C)
        latents = latents + self[0](x, latents)
        out: Tensor = latents + self[1](latents)
        return out


class Resampler(nn.Module):
    """The parts of a picture to ``tokens`` of them, as a Perceiver does; Jaegle et al. 2021 (arXiv 2103.03206)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width = config.width
        self.latents = nn.Parameter(torch.empty(1, config.tokens, width))
        self.proj_in = nn.Linear(config.image_dim, width)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.depth))
        self.proj_out = nn.Linear(width, config.cross_attention_dim)
        self.norm_out = nn.LayerNorm(config.cross_attention_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        # (B, T, E) -> (B, tokens, D)
        x = self.proj_in(embedding)
        latents = self.latents.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        out: Tensor = self.norm_out(self.proj_out(latents))
        return out


class KeysAndValues(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width, channels, bias=False)
        self.to_v_ip = nn.Linear(width, channels, bias=False)

    def forward(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        # (B, tokens, D) -> (B, tokens, C) twice
        return self.to_k_ip(image_tokens), self.to_v_ip(image_tokens)


PROJECTIONS: dict[str, type[nn.Module]] = {"plain": PlainProjection, "plus": Resampler, "full": FullProjection}


class IPAdapter(nn.Module):
    """The whole of it but the image encoder: ``image_proj`` makes tokens of what that gives."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = PROJECTIONS[config.kind](config)
        self.ip_adapter = nn.ModuleList(
            KeysAndValues(channels, config.cross_attention_dim) for channels in config.layers
        )

    def keys_and_values(self, image_tokens: Tensor) -> tuple[Tensor, ...]:
        """Of tokens (B, tokens, D), for each cross-attention in the order of the file, (B, tokens, C) each."""
        return tuple(made for layer in self.ip_adapter for made in layer(image_tokens))
