"""FLUX.2's transformer over latents and a prompt side by side (diffusers' ``Flux2Transformer2DModel``).

Black Forest Labs 2025. First come blocks with weights of their own for the picture's tokens and for the text's, which
attend to each other, then blocks of one stream of both; all blocks of a kind share the modulation that the timestep
gives. A token's position has four axes: which picture, its row, its column, its place in the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig
from calotype.export.models.layers import TimestepEmbedding, sinusoidal_embedding
from calotype.runtime.errors import UnsupportedArchitectureError

AXES = 4
# Cosines and sines, each (N, head / 2), or (B, N, head / 2) where the rows' positions differ.
Turn = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2Config(ModelConfig):
    """Diffusers' settings of a ``Flux2Transformer2DModel``; the usual ones are those of klein 4B."""

    in_channels: int = 128
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "patch_size": (1,),
        "out_channels": (None,),
        "guidance_embeds": (False,),
    }

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if len(axes) != AXES or sum(axes) != self.attention_head_dim or any(size % 2 for size in axes):
            raise UnsupportedArchitectureError(
                f"axes_dims_rope={axes} of the transformer is not supported; supported: {AXES} even numbers that add "
                f"up to attention_head_dim={self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """Of a token."""
        return self.num_attention_heads * self.attention_head_dim


class FeedForward(nn.Module):
    """A gated layer (SwiGLU; Shazeer 2020, arXiv 2002.05202) whose gate comes first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_out(gated(self.linear_in(x)))
        return out


class JointAttention(nn.Module):
    """Both streams attend to both, each through projections of its own."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        width, size = config.width, config.attention_head_dim
        self.size = size
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(size, config.eps) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(size, config.eps) for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_add_out = nn.Linear(width, width, bias=False)

    def forward(self, image: Tensor, text: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        # (B, N, C), (B, T, C) -> (B, N, C), (B, T, C); turn is of the text's tokens, then the picture's
        own = (heads(projection(image), self.size) for projection in (self.to_q, self.to_k, self.to_v))
        added = (
            heads(projection(text), self.size) for projection in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        query, key, value = own
        added_query, added_key, added_value = added
        query = torch.cat([self.norm_added_q(added_query), self.norm_q(query)], dim=1)
        key = torch.cat([self.norm_added_k(added_key), self.norm_k(key)], dim=1)
        attended = attention(query, key, torch.cat([added_value, value], dim=1), turn)
        length = text.shape[1]
        return self.to_out[0](attended[:, length:]), self.to_add_out(attended[:, :length])


class DoubleBlock(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.eps = config.eps
        self.attn = JointAttention(config)
        self.ff = FeedForward(config.width, hidden)
        self.ff_context = FeedForward(config.width, hidden)

    def forward(
        self, image: Tensor, text: Tensor, image_mod: Tensor, text_mod: Tensor, turn: Turn
    ) -> tuple[Tensor, Tensor]:
        # (B, N, C), (B, T, C), two of (B, 1, 6 C)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = image_mod.chunk(6, dim=-1)
        text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = text_mod.chunk(6, dim=-1)
        image_out, text_out = self.attn(
            modulated(image, shift, scale, self.eps), modulated(text, text_shift, text_scale, self.eps), turn
        )
        image = image + gate * image_out
        image = image + gate_mlp * self.ff(modulated(image, shift_mlp, scale_mlp, self.eps))
        text = text + text_gate * text_out
        text = text + text_gate_mlp * self.ff_context(modulated(text, text_shift_mlp, text_scale_mlp, self.eps))
        return image, text


class ParallelAttention(nn.Module):
    """Attention and a gated layer side by side, through one projection in and one out (Dehghani et al. 2023, arXiv
    2302.05442).
    """

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.size, self.parts = config.attention_head_dim, (width, width, width, 2 * hidden)
        self.to_qkv_mlp_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(config.attention_head_dim, config.eps) for _ in range(2))
        self.to_out = nn.Linear(width + hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        query, key, value, mlp = self.to_qkv_mlp_proj(x).split(self.parts, dim=-1)
        query, key, value = (heads(own, self.size) for own in (query, key, value))
        attended = attention(self.norm_q(query), self.norm_k(key), value, turn)
        out: Tensor = self.to_out(torch.cat([attended, gated(mlp)], dim=-1))
        return out


class SingleBlock(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, x: Tensor, modulation: Tensor, turn: Turn) -> Tensor:
        # (B, T + N, C), (B, 1, 3 C)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.attn(modulated(x, shift, scale, self.eps), turn)


class Modulation(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, count * width, bias=False)

    def forward(self, time: Tensor) -> Tensor:
        # (B, C) -> (B, 1, count C)
        out: Tensor = self.linear(F.silu(time))[:, None]
        return out


class TimeEmbedding(nn.Module):
    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.channels = config.timestep_guidance_channels
        self.timestep_embedder = TimestepEmbedding(self.channels, config.width, bias=False)

    def forward(self, timestep: Tensor) -> Tensor:
        # (B,) -> (B, C)
        waves = sinusoidal_embedding(timestep, self.channels, flip_sin_to_cos=True, freq_shift=0)
        out: Tensor = self.timestep_embedder(waves)
        return out


class Flux2Transformer(nn.Module):
    """What the velocity of latents is, by a prompt and, where there are some, reference pictures beside them."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_guidance_embed = TimeEmbedding(config)
        self.double_stream_modulation_img = Modulation(width, 6)
        self.double_stream_modulation_txt = Modulation(width, 6)
        self.single_stream_modulation = Modulation(width, 3)
        self.x_embedder = nn.Linear(config.in_channels, width, bias=False)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, config.in_channels, bias=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        reference_latents: Tensor | None = None,
        reference_positions: Tensor | None = None,
    ) -> Tensor:
        """Predict noise - clean.

        Args:
            sample: (B, C, h, w), the latents.
            timestep: (B,), σ · 1000.
            encoder_hidden_states: (B, T, D), the prompt.
            reference_latents: (B, R, C), the tokens of all reference pictures.
            reference_positions: (B, R, 4) float32, where each stands.

        Returns:
            (B, C, h, w).
        """
        height, width = sample.shape[2:]
        image = self.x_embedder(sample.flatten(2).transpose(1, 2))  # (B, h w, C)
        text = self.context_embedder(encoder_hidden_states)
        angles = self.angles(text.shape[1], height, width)
        if reference_latents is not None and reference_positions is not None:
            image = torch.cat([image, self.x_embedder(reference_latents)], dim=1)
            own = self.angles_of(reference_positions)
            angles = torch.cat([angles.expand(own.shape[0], -1, -1), own], dim=1)
        turn = (angles.cos(), angles.sin())
        time = self.time_guidance_embed(timestep)
        image_mod, text_mod = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        for block in self.transformer_blocks:
            image, text = block(image, text, image_mod, text_mod, turn)
        x, modulation, length = torch.cat([text, image], dim=1), self.single_stream_modulation(time), text.shape[1]
        for block in self.single_transformer_blocks:
            x = block(x, modulation, turn)
        scale, shift = self.norm_out(time).chunk(2, dim=-1)
        drawn = x[:, length : length + height * width]
        out: Tensor = self.proj_out(modulated(drawn, shift, scale, self.config.eps))
        return out.transpose(1, 2).unflatten(2, (height, width))

    def angles(self, text: int, height: int, width: int) -> Tensor:
        """Of a text's tokens and those of a picture, (1, T + h w, head / 2)."""
        letters = torch.arange(text).float()[:, None]  # (T, 1)
        rows, columns = torch.arange(height).float(), torch.arange(width).float()
        nothing = torch.zeros_like(letters)
        places = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)], dim=-1)
        places = F.pad(places.flatten(0, 1), (1, 1))  # (h w, 4): picture, row, column, place in the text
        written = torch.cat([nothing, nothing, nothing, letters], dim=-1)
        return self.angles_of(torch.cat([written, places])[None])

    def angles_of(self, positions: Tensor) -> Tensor:
        """Of tokens at positions (B, N, 4), (B, N, head / 2)."""
        sizes, theta = self.config.axes_dims_rope, self.config.rope_theta
        return torch.cat(
            [
                positions[..., axis, None] * theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
                for axis, size in enumerate(sizes)
            ],
            dim=-1,
        )


def heads(x: Tensor, size: int) -> Tensor:
    """(B, N, C) to (B, N, heads, size)."""
    return x.unflatten(-1, (-1, size))


def gated(x: Tensor) -> Tensor:
    """(…, 2 C) to (…, C)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Tokens (B, N, C), normed, scaled and shifted by (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def attention(query: Tensor, key: Tensor, value: Tensor, turn: Turn) -> Tensor:
    """Heads (B, N, heads, size), queries and keys turned by their positions, to (B, N, C)."""
    query, key = (turned(own, turn).transpose(1, 2) for own in (query, key))
    return F.scaled_dot_product_attention(query, key, value.transpose(1, 2)).transpose(1, 2).flatten(2)


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Pairs of neighbours in (B, N, heads, size) turned; Su et al. 2021 (arXiv 2104.09864)."""
    cosines, sines = (own[..., None, :] for own in turn)  # (B, N, 1, size / 2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-1).flatten(-2)
