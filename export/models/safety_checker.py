"""Stable Diffusion 1's safety checker (diffusers' ``StableDiffusionSafetyChecker``): a picture against concepts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.export.models.clip_vision import ImageEncoderConfig, VisionTransformer

CONCEPTS, SPECIAL = 17, 3


class SafetyChecker(nn.Module):
    """How much more like each concept a picture is than its threshold allows."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.empty(CONCEPTS, config.projection_dim))
        self.special_care_embeds = nn.Parameter(torch.empty(SPECIAL, config.projection_dim))
        self.concept_embeds_weights = nn.Parameter(torch.empty(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.empty(SPECIAL))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Compare.

        Args:
            pixel_values: (B, 3, S, S) normalised pixels.

        Returns:
            Cosine less threshold, of the concepts that need special care, (B, 3), and of the others, (B, 17).
        """
        norm = self.vision_model.post_layernorm
        assert norm is not None
        embedding = F.normalize(self.visual_projection(norm(self.vision_model(pixel_values)[:, 0])), dim=-1)
        special = embedding @ F.normalize(self.special_care_embeds, dim=-1).T - self.special_care_embeds_weights
        return special, embedding @ F.normalize(self.concept_embeds, dim=-1).T - self.concept_embeds_weights
