"""A T2I-Adapter of Stable Diffusion 1.x or XL (diffusers' ``T2IAdapter``).

Mou et al. 2023, "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion
Models" (arXiv 2302.08453).
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.config import ModelConfig
from calotype.runtime.errors import UnsupportedArchitectureError

FULL, FULL_XL, LIGHT = TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig(ModelConfig):
    """Diffusers' settings of a ``T2IAdapter``."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = FULL

    def __post_init__(self) -> None:
        if self.adapter_type not in TYPES:
            raise UnsupportedArchitectureError(
                f"adapter_type={self.adapter_type!r} is not supported; supported: {', '.join(TYPES)}"
            )
        if self.in_channels not in (1, 3):
            raise UnsupportedArchitectureError(
                f"a T2I-Adapter that reads {self.in_channels} channels is not supported; supported: 1 and 3"
            )

    @property
    def halving(self) -> tuple[bool, ...]:
        """Whether each block begins by halving its picture."""
        blocks = len(self.channels) + (self.adapter_type == LIGHT)
        return tuple(index == 2 if self.adapter_type == FULL_XL else index > 0 for index in range(blocks))

    @property
    def features(self) -> list[tuple[int, int]]:
        """Channels of each block's feature, and how many times it is smaller than the latents, as a power of 2."""
        channels = (*self.channels, *self.channels[-1:])[: len(self.halving)]
        first = int(self.adapter_type == FULL_XL)
        return [(count, first + sum(self.halving[: index + 1])) for index, count in enumerate(channels)]

    @property
    def downscale(self) -> int:
        """Pixels of the control picture to a latent, each way; that of SDXL begins with half the latents' size."""
        return self.downscale_factor // 2 if self.adapter_type == FULL_XL else self.downscale_factor


class AdapterResnet(nn.Module):
    """Two convolutions around which the picture is carried past; the second looks at a pixel alone in full adapters."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class AdapterBlock(nn.Module):
    """Resnets, in a light adapter between two convolutions that make the picture narrow and wide again."""

    def __init__(self, before: int, after: int, *, halves: bool, config: T2IAdapterConfig) -> None:
        super().__init__()
        light = config.adapter_type == LIGHT
        inner = after // 4 if light else after
        self.halves = halves
        self.in_conv = nn.Conv2d(before, inner, 1) if light or before != after else nn.Identity()
        self.resnets = nn.Sequential(*(AdapterResnet(inner, 3 if light else 1) for _ in range(config.num_res_blocks)))
        self.out_conv = nn.Conv2d(inner, after, 1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.halves:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        out: Tensor = self.out_conv(self.resnets(self.in_conv(x)))
        return out


class T2IAdapter(nn.Module):
    """What is added to what each block of a UNet that leads down hands on, and in SDXL behind its middle."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        unshuffled = config.in_channels * config.downscale_factor**2
        counts = [count for count, _ in config.features]
        first = unshuffled if config.adapter_type == LIGHT else counts[0]
        body = nn.ModuleList(
            AdapterBlock(before, after, halves=halves, config=config)
            for before, after, halves in zip([first, *counts], counts, config.halving, strict=False)
        )
        self._blocks = list(body)
        self.adapter = nn.ModuleDict({"body": body})
        if config.adapter_type != LIGHT:
            self.adapter["conv_in"] = nn.Conv2d(unshuffled, first, 3, padding=1)

    def forward(self, control_image: Tensor) -> tuple[Tensor, ...]:
        """Make the features.

        Args:
            control_image: (B, in_channels, f*H, f*W), RGB or greys in 0..1; in SDXL H and W are even.

        Returns:
            One feature (B, C, h, w) for each block.
        """
        x = F.pixel_unshuffle(control_image, self.config.downscale_factor)
        if "conv_in" in self.adapter:
            x = self.adapter["conv_in"](x)
        made = []
        for block in self._blocks:
            x = block(x)
            made.append(x)
        return tuple(made)
