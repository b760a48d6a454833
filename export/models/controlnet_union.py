"""A ControlNet for several kinds of control pictures (diffusers' ``ControlNetUnionModel``; xinsir's union and ProMax).

https://github.com/xinsir6/ControlNetPlus. Each picture has a mode, and several go through one evaluation.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from calotype.export.models.controlnet import ControlNet, ControlNetConfig
from calotype.export.models.layers import TimestepEmbedding
from calotype.runtime.errors import UnsupportedArchitectureError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetUnionConfig(ControlNetConfig):
    """Diffusers' settings of a ``ControlNetUnionModel``."""

    conditioning_embedding_out_channels: tuple[int, ...] = (48, 96, 192, 384)
    num_control_type: int = 6
    num_trans_channel: int = 320
    num_trans_head: int = 8
    num_trans_layer: int = 1
    num_proj_channel: int = 320

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.addition_embed_type is None or self.controlnet_conditioning_channel_order != "rgb":
            raise UnsupportedArchitectureError(
                "a ControlNet of several kinds that reads no sizes, or pictures in another order than RGB, is not "
                "supported; supported: those of SDXL"
            )
        if not self.num_trans_channel == self.num_proj_channel == self.block_out_channels[0]:
            raise UnsupportedArchitectureError(
                f"num_trans_channel={self.num_trans_channel} and num_proj_channel={self.num_proj_channel} are not "
                f"supported; supported: {self.block_out_channels[0]}, as many as the first block has"
            )


class TokenBlock(nn.Module):
    """What a transformer does with one token alone, to which attention gives that token's own value.

    The original lays the pictures of a row along the axis that counts rows for attention, and the rows along that of
    the tokens. The rows of one picture are alike there, so each attends to copies of itself; rows of other pictures
    must not be seen. So queries and keys are never computed, and their weights are kept as they are in the file.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads)
        self.ln_1 = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(channels, 4 * channels), "c_proj": nn.Linear(4 * channels, channels)}
        )
        self.ln_2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, C) -> (B, N, C)
        attention, channels = self.attn, x.shape[-1]
        weight, bias = attention.in_proj_weight[2 * channels :], attention.in_proj_bias[2 * channels :]
        x = x + attention.out_proj(nn.functional.linear(self.ln_1(x), weight, bias))
        inner = self.mlp["c_fc"](self.ln_2(x))
        out: Tensor = x + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))
        return out


class ControlNetUnion(ControlNet):
    """See :class:`ControlNet`; it adds up what it makes of several pictures before its first block."""

    def __init__(self, config: ControlNetUnionConfig) -> None:
        super().__init__(config)
        channels, kinds = config.block_out_channels[0], config.num_control_type
        self.task_embedding = nn.Parameter(torch.empty(kinds, channels))
        self.transformer_layes = nn.ModuleList(  # spelt as in the files
            TokenBlock(channels, config.num_trans_head) for _ in range(config.num_trans_layer)
        )
        self.spatial_ch_projs = nn.Linear(channels, channels)
        self._kind_dim = config.addition_time_embed_dim or 0
        self.control_add_embedding = TimestepEmbedding(self._kind_dim * kinds, 4 * channels)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control_image: Tensor,
        conditioning_scale: Tensor,
        control_mode: Tensor,
        picture_scale: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> tuple[Tensor, ...]:
        """Make the residuals; what is not named here is as in :meth:`ControlNet.forward`.

        Args:
            sample: see there.
            timestep: see there.
            encoder_hidden_states: see there.
            control_image: (B, N, 3, f*H, f*W), N pictures.
            conditioning_scale: see there; for several pictures, 1 and theirs in ``picture_scale``.
            control_mode: (B, N, K), 1 at each picture's kind, else 0.
            picture_scale: (B, N), how much of each picture goes in.
            text_embeds: see there.
            time_ids: see there.

        Returns:
            See there.
        """
        kinds = control_mode.amax(1)  # (B, K)
        embedded = self._sinusoids(kinds.flatten(), self._kind_dim).reshape(kinds.shape[0], -1).to(sample.dtype)
        time_embedding = self.embed(sample, timestep, text_embeds, time_ids) + self.control_add_embedding(embedded)
        x = self.conv_in(sample)
        read = self.controlnet_cond_embedding(control_image.flatten(0, 1)).unflatten(0, control_image.shape[:2])
        scale = picture_scale[..., None]  # (B, N, 1)
        tokens = (read.mean((3, 4)) + control_mode @ self.task_embedding) * scale  # (B, N, C)
        for block in self.transformer_layes:
            tokens = block(tokens)
        shift = self.spatial_ch_projs(tokens) * scale
        x = x + (read * scale[..., None, None] + shift[..., None, None]).sum(1)
        return self.residuals(x, time_embedding, encoder_hidden_states, conditioning_scale)
