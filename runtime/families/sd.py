"""Stable Diffusion 1.x and 2.x, with their inpainting and latent-consistency models.

Rombach et al. 2022 (arXiv 2112.10752).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.denoising.guidance import scale_embedding
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.families.base import Conditioner, Encoder
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.request import Request
from calotype.runtime.sessions.session import Session
from calotype.runtime.text.encoders import ClipConditioner, TextEncoder
from calotype.runtime.text.textual_inversion import Embedding, add_embeddings
from calotype.runtime.text.tokenizer import ClipTokenizer

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
SIZES = ("original_size", "crops_coords_top_left", "target_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """A UNet over latents of a convolutional autoencoder, with CLIP text encoders; see :class:`Family`."""

    name: str
    denoiser: str = "unet"
    encoders: tuple[Encoder, ...] = (Encoder(network="text_encoder", tokenizer="tokenizer"),)
    editor: str | None = None
    flow: bool = False

    def check(self, manifest: Manifest) -> None:
        """See :meth:`Family.check`."""
        needed = {*(encoder.network for encoder in self.encoders), self.denoiser, "vae_decoder"}
        missing = sorted(needed - manifest.networks.keys())
        missing += [encoder.tokenizer for encoder in self.encoders if encoder.tokenizer not in manifest.tokenizers]
        if missing:
            raise BundleError(f"the bundle of {manifest.name} has no {', '.join(missing)}; export the bundle again")
        extra = self.context_channels(manifest)
        if extra not in (0, manifest.vae.latent_channels + 1):
            raise BundleError(
                f"the bundle of {manifest.name} has a UNet with {extra} extra channels; inpainting models have 5"
            )

    def conditioner(
        self, bundle: Bundle, sessions: Callable[[str], Session], embeddings: Sequence[Embedding]
    ) -> ClipConditioner:
        """See :meth:`Family.conditioner`."""
        return ClipConditioner(
            [_text_encoder(bundle, encoder, sessions(encoder.network), embeddings) for encoder in self.encoders],
            force_zeros_for_empty_prompt=bundle.manifest.force_zeros_for_empty_prompt,
        )

    def rows(
        self, manifest: Manifest, conditioner: Conditioner, request: Request, canvas: Canvas
    ) -> tuple[Inputs, Inputs | None]:
        """See :meth:`Family.rows`. A UNet distilled with guidance (LCM) is given the scale, and never a second row."""
        if request.clip_skip > manifest.max_clip_skip:
            raise InputError(
                f"clip_skip={request.clip_skip} is more than the {manifest.max_clip_skip} layers that "
                f"{manifest.name} can leave out; use fewer, or export the bundle again if it is an old one"
            )
        assert request.guidance_scale is not None
        common, embedded = self.size_rows(manifest, request, canvas), self._network(manifest).input("timestep_cond")
        if embedded is not None:
            common = {**common, "timestep_cond": scale_embedding(request.guidance_scale, int(embedded.shape[1]))}
        wanted = request.negative_prompt if self.guided(manifest, request.guidance_scale) else None
        conditional, unconditional = conditioner.encode(request.prompt, wanted, request.clip_skip)
        return {**conditional, **common}, None if unconditional is None else {**unconditional, **common}

    def size_rows(self, manifest: Manifest, request: Request, canvas: Canvas) -> Inputs:
        """What the UNet is told of the picture's size: nothing, in these families."""
        for name in SIZES:
            if getattr(request, name) is not None:
                raise InputError(f"{name} is for SDXL models; {manifest.name} is {manifest.family}")
        return {}

    def reference_rows(self, latents: Sequence[Array]) -> Inputs:
        """See :meth:`Family.reference_rows`; there are none."""
        raise NotImplementedError

    def latent_shape(self, manifest: Manifest, canvas: Canvas) -> tuple[int, int, int]:
        """See :meth:`Family.latent_shape`."""
        vae = manifest.vae
        return vae.latent_channels, canvas.height // vae.downscale, canvas.width // vae.downscale

    def context_channels(self, manifest: Manifest) -> int:
        """See :meth:`Family.context_channels`."""
        sample = self._network(manifest).input("sample")
        return 0 if sample is None else int(sample.shape[1]) - manifest.vae.latent_channels

    def guided(self, manifest: Manifest, guidance_scale: float) -> bool:
        """See :meth:`Family.guided`."""
        return guidance_scale > 1 and self._network(manifest).input("timestep_cond") is None

    def solver_settings(self, settings: Mapping[str, Any], area: int, steps: int) -> Mapping[str, Any]:
        """See :meth:`Family.solver_settings`. Align Your Steps has a table for each family."""
        return {**settings, "sigma_spacing": "ays-sd1"} if settings.get("sigma_spacing") == "ays" else settings

    def _network(self, manifest: Manifest) -> ModelSpec:
        return manifest.networks[self.denoiser]


def _text_encoder(bundle: Bundle, encoder: Encoder, session: Session, embeddings: Sequence[Embedding]) -> TextEncoder:
    tokens = bundle.manifest.tokenizers[encoder.tokenizer]
    tokenizer = ClipTokenizer.from_files(bundle.path / tokens.vocab, bundle.path / tokens.merges, tokens)
    if not embeddings:
        return TextEncoder(tokenizer, session)
    network = bundle.manifest.networks[encoder.network]
    spec = network.input("extra_embeddings")
    if spec is None:
        raise BundleError(f"{bundle.path} has a {encoder.network} that takes no embeddings; export the bundle again")
    bundle.check_weights(network)
    vocabulary = SafetensorsFile(bundle.path / network.weights[0]).shape(TOKEN_TABLE)[0]
    extra = add_embeddings(embeddings, encoder.network, tokenizer, vocabulary, int(spec.shape[1]))
    return TextEncoder(tokenizer, session, extra)


SD1 = StableDiffusion(name="sd1")
SD2 = StableDiffusion(name="sd2")
