"""Stable Diffusion XL: two text encoders side by side, the second one's pooled prompt, and the picture's sizes.

Podell et al. 2023 (arXiv 2307.01952). The refiner is not among them.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from calotype.export.checkpoint import Checkpoint
from calotype.export.families.latent_diffusion import SCHEDULER, LatentDiffusion, Reader
from calotype.export.folder import Folder
from calotype.export.graphs import chosen_layer
from calotype.export.models.clip import TextEncoder
from calotype.export.single_file import SingleFile
from calotype.runtime.errors import UnsupportedArchitectureError


class SdxlTextEncoderGraph(nn.Module):
    """The hidden states of a layer, counted from the last but one, bare; and the pooled prompt, projected."""

    def __init__(self, model: TextEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, clip_skip: Tensor, extra_embeddings: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # (B, T), (1,), (E, D) -> (B, T, D), (B, P)
        _, pooled, states = self.model(input_ids, extra_embeddings)
        hidden = chosen_layer(states[:-1], clip_skip)
        return hidden if self.model.text_projection is None else (hidden, pooled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(LatentDiffusion):
    """The base model, and what was made from it."""

    def load_folder(self, folder: Folder) -> Checkpoint:
        """Load a folder in diffusers' layout, but not the refiner's, which has the base's pipelines."""
        if not (folder.path / "text_encoder").is_dir():
            raise UnsupportedArchitectureError(
                f"{folder.path} holds the SDXL refiner, which is not supported; use the base"
            )
        return super().load_folder(folder)

    def has_file(self, file: SingleFile) -> bool:
        """By the embedding of pooled prompt and sizes, beside a context that is wider than one text encoder's."""
        marks = file.marks
        return marks is not None and marks.pooled and all(tower.width < marks.context for tower in file.towers)


SDXL = StableDiffusionXL(
    name="sdxl",
    known_as="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    readers=(
        Reader(hidden_act="quick_gelu", pad_token="<|endoftext|>"),
        Reader(hidden_act="gelu", pad_token="!", pooled=True),
    ),
    text_graph=SdxlTextEncoderGraph,
    heads=None,
    unread_layers=1,
    scaling_factor=0.13025,
    sample_size=128,
    scheduler=SCHEDULER | {"_class_name": "EulerDiscreteScheduler"},
    zeros_for_empty_prompt=True,
)
