"""Stable Diffusion 1.x and 2.x: one text encoder, and one context for all of the UNet.

Rombach et al. 2022 (arXiv 2112.10752). Inpainting models and those distilled for latent consistency are among them.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor, nn

from calotype.export.components import TEXT_ENCODERS
from calotype.export.families.latent_diffusion import SCHEDULER, LatentDiffusion, Reader
from calotype.export.folder import Folder
from calotype.export.graphs import chosen_layer
from calotype.export.models.clip import TextEncoder
from calotype.export.models.unet import UNet
from calotype.export.prediction_type import PREDICTS_NOISE, likeness_to_noise, stated_prediction_type
from calotype.export.single_file import SingleFile
from calotype.export.towers import CLIP_VOCABULARY, Tower
from calotype.export.weights import to_float32

logger = logging.getLogger(__name__)

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
# The width of the text embeddings that every published model of the family reads.
SD1_CONTEXT, SD2_CONTEXT = 768, 1024


class TextEncoderGraph(nn.Module):
    """The hidden states of a layer, counted from the last that the UNet reads, through the final norm."""

    def __init__(self, model: TextEncoder, unread: int) -> None:
        super().__init__()
        self.model, self.unread = model, unread

    def forward(self, input_ids: Tensor, clip_skip: Tensor, extra_embeddings: Tensor) -> Tensor:
        # (B, T), (1,), (E, D) -> (B, T, D)
        text = self.model.text_model
        states = text(input_ids, extra_embeddings)
        out: Tensor = text.final_layer_norm(chosen_layer(states, self.unread, clip_skip))
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusion(LatentDiffusion):
    """Either family; their folders name the same pipelines."""

    def has_folder(self, folder: Folder) -> bool:
        """OpenCLIP's tower, of 2.x, computes the exact GELU; OpenAI's, of 1.x, an approximation of it."""
        if folder.alone:
            return False
        exact = folder.config("text_encoder", TEXT_ENCODERS).get("hidden_act") == "gelu"
        return exact == (self.readers[0].hidden_act == "gelu")

    def has_file(self, file: SingleFile) -> bool:
        """By the width of the UNet's context, or of one that is of no published model by its projections."""
        marks = file.marks
        if marks is None or marks.pooled:
            return False
        linear = marks.linear if marks.context not in (SD1_CONTEXT, SD2_CONTEXT) else marks.context == SD2_CONTEXT
        return linear == (self.readers[0].hidden_act == "gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusion2(StableDiffusion):
    """Its UNet reads the last but one layer of OpenCLIP's tower, and predicts noise or velocity."""

    def layers_read(self, tower: Tower, file: SingleFile) -> int:
        """All but the unread last one, which converters leave out or keep.

        Towers of CLIP have an even number of layers, so an odd number is one that is left without its last. A width
        of no published model, and marks that say otherwise, make that a guess.
        """
        cut = tower.layers % 2 == 1
        if cut == tower.whole and tower.width != SD2_CONTEXT:
            logger.warning(
                "%s does not say whether its UNet reads the last of its text encoder's %d layers; it is exported as if "
                "it %s; if pictures do not follow the prompt, export this model from a folder in diffusers' layout",
                file.path.name,
                tower.layers,
                "does" if cut else "does not",
            )
        return tower.layers if cut else tower.layers - 1

    def prediction_type(self, file: SingleFile, unet: UNet, tower: TextEncoder) -> str:
        """Models of 768 pixels predict velocity, the others noise, and their tensors are alike."""
        stated = file.prediction_type or stated_prediction_type(file, None)
        return stated or _measured_prediction_type(tower, unet, file)

    def trained_size(self, prediction_type: str) -> int:
        """768 pixels where it predicts velocity."""
        return 96 if prediction_type == "v_prediction" else self.sample_size


def _measured_prediction_type(tower: TextEncoder, unet: UNet, file: SingleFile) -> str:
    ids = torch.zeros(1, tower.config.max_position_embeddings, dtype=torch.int64)  # padded with "!", which is 0
    ids[:, :2] = torch.tensor([CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1])
    to_float32(tower)
    to_float32(unet)
    with torch.no_grad():
        context, _, _ = tower(ids)
    likeness = likeness_to_noise(unet, context)
    prediction = "epsilon" if likeness > PREDICTS_NOISE else "v_prediction"
    logger.warning(
        "%s does not say what it predicts; its UNet gives back %.0f%% of pure noise, so it is taken for %s; "
        "if pictures are noise, export with the other --prediction-type",
        file.path.name,
        100 * likeness,
        prediction,
    )
    return prediction


SD1 = StableDiffusion(
    name="sd1",
    known_as="Stable Diffusion 1.x",
    pipelines=PIPELINES,
    readers=(Reader(hidden_act="quick_gelu", pad_token="<|endoftext|>"),),
    text_graph=TextEncoderGraph,
    heads=8,
    scaling_factor=0.18215,
    sample_size=64,
    scheduler=SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
)
SD2 = StableDiffusion2(
    name="sd2",
    known_as="Stable Diffusion 2.x",
    pipelines=PIPELINES,
    readers=(Reader(hidden_act="gelu", pad_token="!"),),
    text_graph=TextEncoderGraph,
    heads=None,
    scaling_factor=0.18215,
    sample_size=64,
    scheduler=SCHEDULER | {"_class_name": "DDIMScheduler"},
)
