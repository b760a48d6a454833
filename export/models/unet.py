"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL (diffusers' ``UNet2DConditionModel``).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752);
Podell et al. 2023, "SDXL" (arXiv 2307.01952).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig, check_divides, per_block
from calotype.export.models.layers import (
    Attention,
    Downsample,
    ImagePrompted,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    sinusoidal_embedding,
)
from calotype.runtime.errors import UnsupportedArchitectureError

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
# What cross-attention reads: text, or text and image prompts.
Context = Tensor | ImagePrompted
# Transformer blocks of the attentions in one block: one number for all, or one for each.
Depths = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """Diffusers' settings of the half that leads down; ``attention_head_dim`` is, as there, a number of heads."""

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[Depths, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    nullable: ClassVar[frozenset[str]] = frozenset({"mid_block_type"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(EncoderConfig):
    """Diffusers' settings of a ``UNet2DConditionModel``."""

    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    reverse_transformer_layers_per_block: tuple[Depths, ...] | None = None
    time_cond_proj_dim: int | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "addition_embed_type_num_heads": (64,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3, None),
        "conv_out_kernel": (3, None),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0, None),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"sample_size", "dropout"})

    def __post_init__(self) -> None:
        for names, valid in ((self.down_block_types, DOWN_BLOCKS), (self.up_block_types, UP_BLOCKS)):
            for name in names:
                if name not in valid:
                    raise UnsupportedArchitectureError(
                        f"UNet block {name!r} is not supported; supported: {', '.join(valid)}"
                    )
        if not len(self.block_out_channels) == len(self.down_block_types) == len(self.up_block_types):
            raise UnsupportedArchitectureError(
                f"the UNet has {len(self.down_block_types)} down blocks, {len(self.up_block_types)} up blocks and "
                f"{len(self.block_out_channels)} channel counts; they must be equal in number"
            )
        if self.mid_block_type not in MID_BLOCKS:
            raise UnsupportedArchitectureError(
                f"mid_block_type={self.mid_block_type!r} is not supported; supported: {', '.join(map(str, MID_BLOCKS))}"
            )
        if self.addition_embed_type not in (None, "text_time"):
            raise UnsupportedArchitectureError(
                f"addition_embed_type={self.addition_embed_type!r} is not supported; supported: None, 'text_time'"
            )
        if self.addition_embed_type is not None and None in (
            self.projection_class_embeddings_input_dim,
            self.addition_time_embed_dim,
        ):
            raise UnsupportedArchitectureError(
                "addition_embed_type='text_time' needs projection_class_embeddings_input_dim and "
                "addition_time_embed_dim in the UNet's config.json"
            )
        check_divides("the UNet's norm_num_groups", self.norm_num_groups, self.block_out_channels)
        for heads, channels, _, _ in zip(self.heads, self.block_out_channels, self.depths, self.up_depths, strict=True):
            check_divides("the UNet's attention_head_dim", heads, (channels,))

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each down block."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return per_block("attention_head_dim", heads, len(self.block_out_channels))

    @property
    def depths(self) -> tuple[tuple[int, ...], ...]:
        """Transformer blocks in each attention of each down block."""
        given = self.transformer_layers_per_block
        blocks = given if isinstance(given, tuple) else (given,) * len(self.layers)
        return _each_layer("transformer_layers_per_block", blocks, self.layers)

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """Transformer blocks in each attention of each up block, the deepest first."""
        given, layers = self.transformer_layers_per_block, tuple(count + 1 for count in reversed(self.layers))
        if self.reverse_transformer_layers_per_block is not None:
            blocks = self.reverse_transformer_layers_per_block
            return _each_layer("reverse_transformer_layers_per_block", blocks, layers)
        blocks = tuple(reversed(given)) if isinstance(given, tuple) else (given,) * len(layers)
        return _each_layer("transformer_layers_per_block", blocks, layers)

    @property
    def mid_depth(self) -> int:
        """Transformer blocks in the attention of the middle."""
        return self.depths[-1][0]

    @property
    def layers(self) -> tuple[int, ...]:
        """Resnets of each down block."""
        return per_block("layers_per_block", self.layers_per_block, len(self.block_out_channels))


class GEGLU(nn.Module):
    """Gated GELU; Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is dropout in diffusers; it has no parameters and does nothing at inference.
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each behind its own layer norm."""

    def __init__(self, dim: int, *, heads: int, context_dim: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads=heads, context_dim=context_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # x (B, N, C), context (B, M, D) -> (B, N, C)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (diffusers' ``Transformer2DModel``)."""

    def __init__(self, channels: int, *, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                channels, heads=heads, context_dim=config.cross_attention_dim, upcast=config.upcast_attention
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # x (B, C, H, W), context (B, M, D) -> (B, C, H, W)
        height, width = x.shape[-2:]
        hidden = self.norm(x)
        if not self.linear:
            hidden = self.proj_in(hidden)
        hidden = hidden.flatten(2).transpose(1, 2)  # (B, H*W, C)
        if self.linear:
            hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        if self.linear:
            hidden = self.proj_out(hidden)
        hidden = hidden.transpose(1, 2).unflatten(2, (height, width))
        if not self.linear:
            hidden = self.proj_out(hidden)
        return x + hidden


class DownBlock(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, *, index: int, layers: int, downsample: bool, config: UNetConfig
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(in_channels if layer == 0 else out_channels, out_channels, config) for layer in range(layers)
        )
        if config.down_block_types[index] == "CrossAttnDownBlock2D":
            self.attentions = nn.ModuleList(
                SpatialTransformer(out_channels, heads=config.heads[index], depth=depth, config=config)
                for depth in config.depths[index]
            )
        else:
            self.attentions = nn.ModuleList()
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(
        self, x: Tensor, time_embedding: Tensor, context: Context, feature: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What goes on, and the skip connections; for a T2I-Adapter's ``feature`` see :func:`feature_places`."""
        skips = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time_embedding)
            if len(self.attentions) > 0:
                x = self.attentions[index](x, context)
                if feature is not None and index == len(self.resnets) - 1:
                    x = x + feature
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        if feature is not None and len(self.attentions) == 0:
            x = skips[-1] = x + feature
        return x, skips


class MidBlock(nn.Module):
    """One resnet, and behind it attention and another; pruned models have the first alone, or no such block."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nn.ModuleList(_resnet(channels, channels, config) for _ in range(1 + attends))
        self.attentions = nn.ModuleList(
            SpatialTransformer(channels, heads=config.heads[-1], depth=config.mid_depth, config=config)
            for _ in range(attends)
        )

    def forward(self, x: Tensor, time_embedding: Tensor, context: Context) -> Tensor:
        x = self.resnets[0](x, time_embedding)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), time_embedding)
        return x


class UpBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: list[int],
        *,
        index: int,
        upsample: bool,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet((in_channels if layer == 0 else out_channels) + skip, out_channels, config)
            for layer, skip in enumerate(skip_channels)
        )
        if config.up_block_types[index] == "CrossAttnUpBlock2D":
            mirrored = len(config.block_out_channels) - 1 - index
            self.attentions = nn.ModuleList(
                SpatialTransformer(out_channels, heads=config.heads[mirrored], depth=depth, config=config)
                for depth in config.up_depths[index]
            )
        else:
            self.attentions = nn.ModuleList()
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], time_embedding: Tensor, context: Context, layers: slice = slice(None)
    ) -> Tensor:
        """Its ``layers``, each of which takes the last of ``skips``; only the outermost block is walked in parts."""
        for index in range(len(self.resnets))[layers]:
            x = self.resnets[index](torch.cat([x, skips.pop()], dim=1), time_embedding)
            if len(self.attentions) > 0:
                x = self.attentions[index](x, context)
        for upsampler in self.upsamplers:
            # The next skip knows the size: an odd number of rows or columns does not survive halving and doubling.
            x = upsampler(x, (skips[-1].shape[-2], skips[-1].shape[-1]))
        return x


class UNetEncoder(nn.Module):
    """The half of a UNet that leads down, which a ControlNet is a copy of; the timestep is a vector, one per row."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, layers = config.block_out_channels, config.layers
        last, time_embed_dim = len(channels) - 1, channels[0] * 4
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_embed_dim, cond_dim=config.time_cond_proj_dim)
        if config.addition_embed_type == "text_time":
            self.add_embedding: TimestepEmbedding | None = TimestepEmbedding(
                config.projection_class_embeddings_input_dim or 0, time_embed_dim
            )
        else:
            self.add_embedding = None
        self._embedded = channels[0], config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift
        self.down_blocks = nn.ModuleList(
            DownBlock(
                channels[max(index - 1, 0)],
                out_channels,
                index=index,
                layers=layers[index],
                downsample=index < last,
                config=config,
            )
            for index, out_channels in enumerate(channels)
        )
        self.mid_block = None if config.mid_block_type is None else MidBlock(channels[-1], config)

    def descend(
        self, x: Tensor, time_embedding: Tensor, context: Context, features: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """What the middle makes of ``x`` (B, block_out_channels[0], H, W), and the skip connections, ``x`` first.

        ``features`` are a T2I-Adapter's, one for each block, or none.
        """
        skips = [x]
        for block, feature in itertools.zip_longest(self.down_blocks, features):
            x, block_skips = block(x, time_embedding, context, feature)
            skips += block_skips
        if self.mid_block is not None:
            x = self.mid_block(x, time_embedding, context)
        return x, skips

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The timestep, and what else holds for a whole picture, (B, 4 * block_out_channels[0])."""
        channels, size_dim, _, _ = self._embedded
        time_embedding: Tensor = self.time_embedding(
            self._sinusoids(timestep, channels).to(sample.dtype), timestep_cond
        )
        if self.add_embedding is not None:
            if text_embeds is None or time_ids is None or size_dim is None:
                raise ValueError("this UNet needs text_embeds and time_ids")
            size_embedding = self._sinusoids(time_ids.flatten(), size_dim)
            size_embedding = size_embedding.reshape(time_ids.shape[0], -1).to(sample.dtype)
            time_embedding = time_embedding + self.add_embedding(torch.cat([text_embeds, size_embedding], dim=-1))
        return time_embedding

    def _sinusoids(self, values: Tensor, dim: int) -> Tensor:
        _, _, flip, shift = self._embedded
        return sinusoidal_embedding(values, dim, flip_sin_to_cos=flip, freq_shift=shift)


class UNet(UNetEncoder):
    """Predicts the noise (or the velocity) in a latent; the timestep is a vector, one per row."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.config = config
        channels = config.block_out_channels
        last = len(channels) - 1
        skips = [count for count, _ in skip_connections(config)]
        up_blocks = []
        for index, out_channels in enumerate(reversed(channels)):
            up_blocks.append(
                UpBlock(
                    channels[last - max(index - 1, 0)],
                    out_channels,
                    [skips.pop() for _ in range(config.layers[last - index] + 1)],
                    index=index,
                    upsample=index < last,
                    config=config,
                )
            )
        self.up_blocks = nn.ModuleList(up_blocks)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            sample: (B, in_channels, H, W) noisy latents.
            timestep: (B,) float, 0..num_train_timesteps - 1.
            encoder_hidden_states: (B, T, cross_attention_dim).
            text_embeds: SDXL, (B, P) pooled prompt embedding.
            time_ids: SDXL, (B, 6) original size, crop, target size; pixels.
            timestep_cond: LCM, (B, time_cond_proj_dim) guidance embedding.

        Returns:
            (B, out_channels, H, W), in the dtype of ``sample``.
        """
        return self.deep(sample, timestep, encoder_hidden_states, text_embeds, time_ids, timestep_cond)[0]

    def deep(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict, and give the deep feature for :meth:`shallow` too, (B, block_out_channels[0], H, W).

        It is what the last layer is given beside its skip connection: the first skip branch of Ma et al. 2023,
        "DeepCache" (arXiv 2312.00858).
        """
        time_embedding = self.embed(sample, timestep, text_embeds, time_ids, timestep_cond)
        x, skips = self.descend(self.conv_in(sample), time_embedding, encoder_hidden_states)
        return self._ascend(x, skips, time_embedding, encoder_hidden_states)

    def controlled(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        **added: Tensor,
    ) -> Tensor:
        """Predict with what is ``added``, (B, C, h, w) each.

        ControlNets' residuals are added to the skip connections alone, and behind the middle; T2I-Adapters' features
        to what leaves each block, and the last behind the middle.
        """
        time_embedding = self.embed(sample, timestep, text_embeds, time_ids, timestep_cond)
        return self._controlled(sample, time_embedding, encoder_hidden_states, added)

    def prompted(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        image_bias: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        **added: Tensor,
    ) -> Tensor:
        """Predict as :meth:`controlled`, and with image prompts.

        Args:
            sample: see :meth:`forward`, as for all that is not named here.
            timestep: see :meth:`forward`.
            encoder_hidden_states: see :meth:`forward`.
            image_bias: (B, A, N), what is added to the scores of N image tokens of each of A groups.
            text_embeds: see :meth:`forward`.
            time_ids: see :meth:`forward`.
            timestep_cond: see :meth:`forward`.
            added: see :meth:`controlled`; and for each block that has them keys and values of its L cross-attentions,
                (B, L, A, N, C) each, as ``down_0_image_keys`` and ``down_0_image_values``.
        """
        time_embedding = self.embed(sample, timestep, text_embeds, time_ids, timestep_cond)
        images = (
            (keys, values)
            for block, _, _ in cross_attentions(self.config)
            for keys, values in zip(
                added[f"{block}_image_keys"].unbind(1), added[f"{block}_image_values"].unbind(1), strict=True
            )
        )
        context = ImagePrompted(text=encoder_hidden_states, images=images, bias=image_bias)
        return self._controlled(sample, time_embedding, context, added)

    def _controlled(
        self, sample: Tensor, time_embedding: Tensor, context: Context, added: Mapping[str, Tensor]
    ) -> Tensor:
        features = [added[f"adapter_feature_{index}"] for index in range(len(self.down_blocks) + 1)]
        x, skips = self.descend(self.conv_in(sample), time_embedding, context, features[:-1])
        skips = [skip + added[f"down_residual_{index}"] for index, skip in enumerate(skips)]
        x = x + features[-1] + added["mid_residual"]
        return self._ascend(x, skips, time_embedding, context)[0]

    def shallow(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        deep_feature: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Predict with the first convolution and the last layer alone, on the ``deep_feature`` of another step."""
        time_embedding = self.embed(sample, timestep, text_embeds, time_ids, timestep_cond)
        return self._last_layer(deep_feature, [self.conv_in(sample)], time_embedding, encoder_hidden_states)

    def _ascend(
        self, x: Tensor, skips: list[Tensor], time_embedding: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        *inner, outermost = self.up_blocks
        for block in inner:
            x = block(x, skips, time_embedding, context)
        x = outermost(x, skips, time_embedding, context, slice(None, -1))
        return self._last_layer(x, skips, time_embedding, context), x

    def _last_layer(self, x: Tensor, skips: list[Tensor], time_embedding: Tensor, context: Context) -> Tensor:
        x = self.up_blocks[-1](x, skips, time_embedding, context, slice(-1, None))
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


def skip_connections(config: UNetConfig) -> list[tuple[int, int]]:
    """Channels of each skip connection, the outermost first, and the level it is of, where 0 is the latents' own."""
    channels, last = config.block_out_channels, len(config.block_out_channels) - 1
    found = [(channels[0], 0)]
    for level, count in enumerate(channels):
        found += [(count, level)] * config.layers[level]
        found += [(count, level + 1)] * (level < last)
    return found


def cross_attentions(config: UNetConfig) -> list[tuple[str, int, int]]:
    """Each block that attends to the prompt, in the order of computing: its name, how many times, and its channels."""
    channels, middle = config.block_out_channels, config.mid_block_type == "UNetMidBlock2DCrossAttn"
    found = [
        (f"down_{index}", sum(config.depths[index]), channels[index])
        for index, kind in enumerate(config.down_block_types)
        if kind == "CrossAttnDownBlock2D"
    ]
    if middle:
        found.append(("mid", config.mid_depth, channels[-1]))
    return found + [
        (f"up_{index}", sum(config.up_depths[index]), channels[-1 - index])
        for index, kind in enumerate(config.up_block_types)
        if kind == "CrossAttnUpBlock2D"
    ]


def feature_places(config: UNetConfig) -> list[int]:
    """The number of the skip connection that each down block's feature of a T2I-Adapter is added to, and what goes on
    from there, as diffusers does: what the last attention makes; without any, what leaves the block.
    """
    places, last = [], 0
    for level, (count, kind) in enumerate(zip(config.layers, config.down_block_types, strict=True)):
        halves = level < len(config.layers) - 1
        places.append(last + count + (halves and kind == "DownBlock2D"))
        last += count + halves
    return places


def _each_layer(name: str, blocks: tuple[Depths, ...], layers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """One number for each of the ``layers`` of each of the ``blocks``."""
    if len(blocks) != len(layers):
        raise UnsupportedArchitectureError(
            f"{name}={blocks!r} is not supported; supported: one for each of {len(layers)} blocks, or one number"
        )
    return tuple(per_block(name, depths, count) for depths, count in zip(blocks, layers, strict=True))


def _resnet(in_channels: int, out_channels: int, config: UNetConfig) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        time_embed_dim=config.block_out_channels[0] * 4,
    )
