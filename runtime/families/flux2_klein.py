"""FLUX.2 klein: a transformer that is trained by flow matching, and reads prompts through a language model.

Black Forest Labs 2026. Latents are packed, 2 × 2 of the autoencoder's as channels, so that a token is one of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import EDITING, Manifest
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.families.base import Conditioner, Encoder
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.request import Request
from calotype.runtime.sessions.session import Session
from calotype.runtime.text.byte_level import ByteLevelTokenizer
from calotype.runtime.text.language_model import LanguageModel
from calotype.runtime.text.textual_inversion import Embedding

TEXT, TOKENIZER, TRANSFORMER = "text_encoder", "tokenizer", "transformer"
PROMPT = "encoder_hidden_states"
NEEDED = (TEXT, TRANSFORMER, "vae_decoder")
# Qwen3's chat with one message of the user's, and an answer that begins without thinking.
FRAME = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
# What is another model's, by the request's fields.
FOREIGN = ("original_size", "crops_coords_top_left", "target_size")
TIME = 10  # between one reference picture and the next
logger = logging.getLogger(__name__)


class KleinConditioner:
    """See :class:`Conditioner`."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def encode(self, prompt: str, negative_prompt: str | None, clip_skip: int) -> tuple[Inputs, Inputs | None]:
        """See :meth:`Conditioner.encode`; no layer can be left out."""
        if clip_skip:
            raise InputError(f"clip_skip={clip_skip} is about CLIP, and this model has none; leave it out")
        conditional = {PROMPT: self._model.encode(prompt)}
        if negative_prompt is None:
            return conditional, None
        return conditional, {PROMPT: self._model.encode(negative_prompt)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux2Klein:
    """See :class:`calotype.runtime.families.base.Family`."""

    name: str = "flux2-klein"
    denoiser: str = TRANSFORMER
    encoders: tuple[Encoder, ...] = (Encoder(network=TEXT, tokenizer=TOKENIZER),)
    editor: str | None = EDITING
    flow: bool = True

    def check(self, manifest: Manifest) -> None:
        """See :meth:`Family.check`."""
        missing = [name for name in NEEDED if name not in manifest.networks]
        tokenizer = manifest.tokenizers.get(TOKENIZER)
        missing += [TOKENIZER] if tokenizer is None or tokenizer.kind != "byte-level" else []
        if missing:
            raise BundleError(f"the bundle of {manifest.name} has no {', '.join(missing)}; export the bundle again")
        if manifest.networks[TEXT].input("attention_mask") is None:
            raise BundleError(f"the {TEXT} of {manifest.name} takes no attention_mask; export the bundle again")
        prompt = manifest.networks[TRANSFORMER].input(
            PROMPT
        )  # not every transformer has one: the contract asks for none
        if prompt is None or len(prompt.shape) != 3 or prompt.shape[:2] != ("rows", "tokens"):
            raise BundleError(
                f"the {TRANSFORMER} of {manifest.name} takes no {PROMPT} of (rows, tokens, n); export the bundle again"
            )

    def conditioner(
        self, bundle: Bundle, sessions: Callable[[str], Session], embeddings: Sequence[Embedding]
    ) -> KleinConditioner:
        """See :meth:`Family.conditioner`."""
        if embeddings:
            raise InputError(f"textual inversion is for CLIP, and {bundle.manifest.name} reads prompts without it")
        spec = bundle.manifest.tokenizers[TOKENIZER]
        tokenizer = ByteLevelTokenizer.from_files(bundle.path / spec.vocab, bundle.path / spec.merges, spec)
        return KleinConditioner(LanguageModel(tokenizer, sessions(TEXT), FRAME))

    def rows(
        self, manifest: Manifest, conditioner: Conditioner, request: Request, canvas: Canvas
    ) -> tuple[Inputs, Inputs | None]:
        """See :meth:`Family.rows`."""
        for name in FOREIGN:
            if getattr(request, name) is not None:
                raise InputError(f"{name} is for SDXL models; {manifest.name} is {manifest.family}")
        assert request.guidance_scale is not None
        guided = self.guided(manifest, request.guidance_scale)
        if not guided and request.guidance_scale > 1:
            logger.warning("%s was distilled to draw without guidance, so guidance_scale is ignored", manifest.name)
        return conditioner.encode(request.prompt, request.negative_prompt if guided else None, request.clip_skip)

    def reference_rows(self, latents: Sequence[Array]) -> Inputs:
        """See :meth:`Family.reference_rows`: tokens of all pictures one after another, and where each stands.

        The picture that is drawn is at time 0, reference k at time 10 + 10 k, each with rows and columns of its own.
        """
        tokens = [own.reshape(len(own), -1).T for own in latents]
        places = [
            np.stack([np.full((height, width), TIME + TIME * number), *np.indices((height, width))], axis=-1)
            for number, (_, height, width) in enumerate(own.shape for own in latents)
        ]
        positions = np.concatenate([own.reshape(-1, 3) for own in places]).astype(np.float32)
        return {
            "reference_latents": np.ascontiguousarray(np.concatenate(tokens)),
            "reference_positions": np.pad(positions, ((0, 0), (0, 1))),
        }

    def latent_shape(self, manifest: Manifest, canvas: Canvas) -> tuple[int, int, int]:
        """See :meth:`Family.latent_shape`."""
        vae = manifest.vae
        return vae.latent_channels, canvas.height // vae.downscale, canvas.width // vae.downscale

    def context_channels(self, manifest: Manifest) -> int:
        """See :meth:`Family.context_channels`; the transformer is given the latents alone."""
        return 0

    def guided(self, manifest: Manifest, guidance_scale: float) -> bool:
        """See :meth:`Family.guided`; a distilled model takes none, whatever is asked for."""
        return guidance_scale > 1 and not manifest.distilled

    def solver_settings(self, settings: Mapping[str, Any], area: int, steps: int) -> Mapping[str, Any]:
        """See :meth:`Family.solver_settings`. The steps are even before they are shifted, as the model's pipeline has
        them.
        """
        return {"timestep_spacing": "trailing", "mu": empirical_mu(area, steps), **settings}


def empirical_mu(tokens: int, steps: int) -> float:
    """How far noise levels are shifted, by the number of a picture's tokens and of steps: as fitted by the authors."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190  # from 10 steps to 200
    return slope * steps + many - 200 * slope


FLUX2_KLEIN = Flux2Klein()
