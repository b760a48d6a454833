"""What every family says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.request import Request
from calotype.runtime.sessions.session import Session
from calotype.runtime.text.textual_inversion import Embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A text encoder's network, and the tokenizer it has, by their names in the manifest."""

    network: str
    tokenizer: str


class Conditioner(Protocol):
    """The text encoders of an open model."""

    def encode(self, prompt: str, negative_prompt: str | None, clip_skip: int) -> tuple[Inputs, Inputs | None]:
        """Encode both prompts.

        Returns:
            The denoising network's rows for ``prompt`` and for ``negative_prompt``, of equal names and shapes; the
            latter None where there is none.
        """


class Family(Protocol):
    """What pictures of a family need beside the loop; it holds no state.

    Attributes:
        name: as the manifest has it.
        denoiser: the denoising network's name in the manifest; it is given ``sample``, ``timestep`` and named rows, and
            gives ``noise_pred``.
        encoders: the text encoders, in the order of their embeddings.
        editor: the denoising network's name where reference pictures are given, which are rows of it; None takes none.
        flow: whether it is trained by flow matching; see :mod:`calotype.runtime.schedulers.flow`.
    """

    name: str
    denoiser: str
    encoders: tuple[Encoder, ...]
    editor: str | None
    flow: bool

    def check(self, manifest: Manifest) -> None:
        """Raises BundleError where a bundle of this family lacks what it needs."""

    def conditioner(
        self, bundle: Bundle, sessions: Callable[[str], Session], embeddings: Sequence[Embedding]
    ) -> Conditioner:
        """Build the text encoders over their open sessions, found by their networks' names."""

    def rows(
        self, manifest: Manifest, conditioner: Conditioner, request: Request, canvas: Canvas
    ) -> tuple[Inputs, Inputs | None]:
        """Encode a resolved request.

        Returns:
            The denoising network's rows with and without the prompt; the latter None where guidance never needs them.

        Raises:
            InputError: the request asks for what this model cannot do.
        """

    def reference_rows(self, latents: Sequence[Array]) -> Inputs:
        """What the network ``editor`` is given of reference pictures, beside the rows of the prompt.

        Args:
            latents: of each picture, (C, h, w) in a size of its own, as the denoising network knows them.
        """

    def latent_shape(self, manifest: Manifest, canvas: Canvas) -> tuple[int, int, int]:
        """The shape of a job's latents, (C, h, w)."""

    def context_channels(self, manifest: Manifest) -> int:
        """How many channels of the network's sample are not the latents but a mask and a masked picture."""

    def guided(self, manifest: Manifest, guidance_scale: float) -> bool:
        """Whether a picture of that scale takes a second row, without the prompt."""

    def solver_settings(self, settings: Mapping[str, Any], area: int, steps: int) -> Mapping[str, Any]:
        """The scheduler's settings, with what depends on the family in them filled in.

        Args:
            settings: the model's, with those of the request in their place.
            area: how many latents the picture has, height times width.
            steps: how many steps it takes.
        """
