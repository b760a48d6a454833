"""The picture towers of CLIP and OpenCLIP (transformers' ``CLIPVisionModelWithProjection``).

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from calotype.export.models.clip import ACTIVATIONS, Layers
from calotype.export.models.config import ModelConfig, check_divides
from calotype.runtime.errors import UnsupportedArchitectureError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(ModelConfig):
    """Transformers' settings of a ``CLIPVisionConfig``."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures", "attention_dropout", "dropout", "dtype", "initializer_factor", "initializer_range",
            "model_type", "torch_dtype", "transformers_version",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS or self.num_channels != 3:
            raise UnsupportedArchitectureError(
                f"an image encoder of {self.num_channels} channels and hidden_act={self.hidden_act!r} is not "
                f"supported; supported: 3, and {', '.join(ACTIVATIONS)}"
            )
        check_divides("the image encoder's num_attention_heads", self.num_attention_heads, (self.hidden_size,))

    @property
    def tokens(self) -> int:
        """Patches of a picture, and the token that stands for all of it."""
        return (self.image_size // self.patch_size) ** 2 + 1


class PatchEmbeddings(nn.Module):
    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.tokens, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # (B, 3, S, S) -> (B, 1 + patches, C)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # so spelt in every checkpoint
        self.encoder = Layers(config, causal=False)
        self.post_layernorm: nn.LayerNorm | None = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # (B, 3, S, S) -> (B, 1 + patches, C)
        x: Tensor = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class ImageEncoder(nn.Module):
    """A picture to one embedding, or, without its last layer and what follows, to one for each of its parts."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection: nn.Linear | None = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def leave_last_layer_out(self) -> None:
        """Give the hidden states before the last layer; that one, the last norm and the projection are dropped."""
        del self.vision_model.encoder.layers[-1]
        self.vision_model.post_layernorm = self.visual_projection = None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode.

        Args:
            pixel_values: (B, 3, S, S) normalised pixels.

        Returns:
            (B, projection_dim); without its last layer (B, 1 + patches, hidden_size), not normalised.
        """
        hidden: Tensor = self.vision_model(pixel_values)
        if self.vision_model.post_layernorm is None or self.visual_projection is None:
            return hidden
        out: Tensor = self.visual_projection(self.vision_model.post_layernorm(hidden[:, 0]))
        return out
