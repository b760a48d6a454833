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
from calotype.export.towers import Tower
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

WIDTHS = (768, 1280)  # of the text encoders of every published model of the family


class SdxlTextEncoderGraph(nn.Module):
    """The hidden states of a layer, counted from the last that the UNet reads, and the pooled prompt, projected."""

    def __init__(self, model: TextEncoder, unread: int) -> None:
        super().__init__()
        self.model, self.unread = model, unread

    def forward(self, input_ids: Tensor, clip_skip: Tensor, extra_embeddings: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # (B, T), (1,), (E, D) -> (B, T, D), (B, P)
        _, pooled, states = self.model(input_ids, extra_embeddings)
        hidden = chosen_layer(states, self.unread, clip_skip)
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

    def layers_unread(self, tower: Tower, reader: Reader) -> int:
        """The last one, which converters leave out or keep; the pooled prompt is made of it where there is one.

        Raises:
            CheckpointError: it was left out of the text encoder that the pooled prompt comes from.
        """
        # Towers of CLIP have an even number of layers; of one that is of no published width, nothing is known.
        if tower.width not in WIDTHS or tower.layers % 2 == 0:
            return self.unread_layers
        if reader.pooled:
            raise CheckpointError(
                f"the text encoder under {tower.prefix} has {tower.layers} layers; the one after them, which the "
                "model's pooled prompt is made of, was lost when this file was written: take the publisher's own"
            )
        return self.unread_layers - 1


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
