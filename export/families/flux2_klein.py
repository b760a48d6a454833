"""FLUX.2 klein: a transformer that draws and edits, with a language model for prompts; Black Forest Labs 2026."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from calotype.export.byte_level import read_byte_level
from calotype.export.checkpoint import Checkpoint
from calotype.export.components import load_flux2_autoencoder, load_flux2_transformer, load_language_model
from calotype.export.folder import Folder
from calotype.export.graphs import language_model_plan, transformer_plans, vae_plans, vae_spec
from calotype.export.single_file import SingleFile
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# The hidden states that are read side by side, by their share of the language model's layers: of 36, those of layers 9,
# 18 and 27.
SHARES = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
LENGTH = 512  # of a prompt in tokens
SAMPLE_SIZE = 64  # of the latents
STEPS, DISTILLED_STEPS = 50, 4
GUIDANCE = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2Klein:
    """The distilled models, and the base models with guidance."""

    name: str = "flux2-klein"
    known_as: str = "FLUX.2 klein"
    pipelines: tuple[str, ...] = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    folders: tuple[str, ...] = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")

    def has_folder(self, folder: Folder) -> bool:
        """Every folder with one of its pipelines."""
        return not folder.alone

    def load_folder(self, folder: Folder) -> Checkpoint:
        """Load a folder in diffusers' layout."""
        scheduler = folder.scheduler()
        if scheduler.get("_class_name") != SCHEDULER:
            raise UnsupportedArchitectureError(
                f"{folder.path} names the scheduler {scheduler.get('_class_name')}, which is not supported with "
                f"{self.known_as}; supported: {SCHEDULER}"
            )
        text = load_language_model(folder, "text_encoder", SHARES)
        transformer, vae = load_flux2_transformer(folder), load_flux2_autoencoder(folder)
        tokenizer = read_byte_level(folder.path / "tokenizer", LENGTH)
        config = transformer.config
        if (config.in_channels, config.joint_attention_dim) != (vae.config.packed_channels, text.width):
            raise CheckpointError(
                f"the transformer reads {config.in_channels} channels and prompts of width "
                f"{config.joint_attention_dim}, the autoencoder gives {vae.config.packed_channels} and the text "
                f"encoder {text.width}; the components are of different models"
            )
        distilled = folder.index.get("is_distilled") is True
        return Checkpoint(
            family=self.name,
            components={"text_encoder": text, "transformer": transformer, "vae": vae},
            graphs=(
                language_model_plan("text_encoder", text, tokenizer),
                *transformer_plans(transformer),
                *vae_plans(vae),
            ),
            tokenizers={"tokenizer": tokenizer},
            scheduler=scheduler,
            vae=vae_spec(vae),
            sample_size=SAMPLE_SIZE,
            distilled=distilled,
            defaults={
                "num_inference_steps": DISTILLED_STEPS if distilled else STEPS,
                "guidance_scale": 1.0 if distilled else GUIDANCE,
            },
            card=folder.card,
            source=folder.source,
        )

    def has_file(self, file: SingleFile) -> bool:
        """None: what people have in one file is the transformer alone."""
        return False

    def load_file(self, file: SingleFile) -> Checkpoint:
        """Never asked."""
        raise NotImplementedError


FLUX2_KLEIN = Flux2Klein()
