"""A ControlNet of Stable Diffusion 1.x, 2.x or XL (diffusers' ``ControlNetModel``).

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.unet import EncoderConfig, UNetConfig, UNetEncoder, skip_connections
from calotype.runtime.errors import UnsupportedArchitectureError

CHANNEL_ORDERS = ("rgb", "bgr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """Diffusers' settings of a ``ControlNetModel``."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: UNetConfig.neutral[name]
        for name in (
            "act_fn", "addition_embed_type_num_heads", "class_embed_type", "downsample_padding", "encoder_hid_dim",
            "encoder_hid_dim_type", "mid_block_scale_factor", "num_class_embeds", "only_cross_attention",
            "resnet_time_scale_shift",
        )
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.controlnet_conditioning_channel_order not in CHANNEL_ORDERS:
            raise UnsupportedArchitectureError(
                f"controlnet_conditioning_channel_order={self.controlnet_conditioning_channel_order!r} is not "
                f"supported; supported: {', '.join(CHANNEL_ORDERS)}"
            )
        if self.conditioning_channels != 3 or self.mid_block_type is None:
            raise UnsupportedArchitectureError(
                "a ControlNet that reads no picture of three channels, or has no middle, is not supported"
            )
        _ = self.half  # which is checked

    @property
    def half(self) -> UNetConfig:
        """The settings of the UNet that this is half of; what leads up is not read."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(EncoderConfig)}
        return UNetConfig(up_block_types=("UpBlock2D",) * len(self.block_out_channels), **shared)

    @property
    def downscale(self) -> int:
        """Pixels of the control picture to a latent, each way."""
        return int(2 ** (len(self.conditioning_embedding_out_channels) - 1))


class ConditioningEmbedding(nn.Module):
    """The control picture, scaled down to the size of the latents."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        counts = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, counts[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(counts):
            blocks += [nn.Conv2d(before, before, 3, padding=1), nn.Conv2d(before, after, 3, padding=1, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(counts[-1], config.block_out_channels[0], 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        # (B, 3, f*H, f*W) -> (B, block_out_channels[0], H, W)
        x = F.silu(self.conv_in(image))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """What is added to each skip connection of a UNet, and to what comes out of its middle."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.half)
        self.config = config
        self.controlnet_cond_embedding = ConditioningEmbedding(config)
        self.controlnet_down_blocks = nn.ModuleList(
            nn.Conv2d(channels, channels, 1) for channels, _ in skip_connections(config.half)
        )
        self.controlnet_mid_block = nn.Conv2d(config.block_out_channels[-1], config.block_out_channels[-1], 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control_image: Tensor,
        conditioning_scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Make the residuals.

        Args:
            sample: (B, in_channels, H, W) noisy latents.
            timestep: (B,) float.
            encoder_hidden_states: (B, T, cross_attention_dim).
            control_image: (B, 3, f*H, f*W) RGB in 0..1, and -1 where an inpainting ControlNet is to draw.
            conditioning_scale: (B, R), what each of the R residuals is multiplied by, the middle's last.
            text_embeds: SDXL, (B, P) pooled prompt embedding.
            time_ids: SDXL, (B, 6) original size, crop, target size; pixels.

        Returns:
            R residuals (B, C, h, w): one for each skip connection, the outermost first, and the middle's; pooled ones
            (B, C, 1, 1), which hold for every pixel.
        """
        time_embedding = self.embed(sample, timestep, text_embeds, time_ids)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            control_image = control_image.flip(1)
        x = self.conv_in(sample) + self.controlnet_cond_embedding(control_image)
        return self.residuals(x, time_embedding, encoder_hidden_states, conditioning_scale)

    def residuals(self, x: Tensor, time_embedding: Tensor, context: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """What is made of ``x`` (B, block_out_channels[0], H, W), the latents with what the picture adds."""
        x, skips = self.descend(x, time_embedding, context)
        made = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        made.append(self.controlnet_mid_block(x))
        if self.config.global_pool_conditions:
            made = [one.mean((2, 3), keepdim=True) for one in made]
        return tuple(one * scales[:, index, None, None, None] for index, one in enumerate(made))
