"""What a family of models is to the exporter."""

from __future__ import annotations

from typing import Protocol

from calotype.export.checkpoint import Checkpoint
from calotype.export.folder import Folder
from calotype.export.single_file import SingleFile


class Family(Protocol):
    """One kind of model: what its checkpoints look like, how they are loaded, and which graphs are made of them.

    The exporter asks every family whether a source is its own, has the one that says yes load it, and writes a bundle
    from the :class:`Checkpoint` that comes back. Nothing outside the family's file knows it by name: the checkpoint
    carries its components, its graphs with their inputs and outputs, and the manifest's fields.

    The other half is ``runtime/families/``, which finds the same ``name`` in the manifest. What holds for every family:

    * the denoising network takes ``sample``, ``timestep`` and named rows, and gives ``noise_pred``; what the network
      needs beyond them lies in its graph, or is one more input;
    * a text encoder takes ``input_ids``, ``clip_skip`` and ``extra_embeddings`` where it can;
    * ``vae_decoder`` takes ``latents`` and gives ``image``, ``vae_encoder`` takes ``image`` and gives ``mean`` and
      ``logvar``, both in the autoencoder's own scale, which the manifest's ``vae`` translates.

    An inpainting model and one with embedded guidance are no families of their own: their graphs have other shapes or
    one more input, and the runtime goes by those.
    """

    @property
    def name(self) -> str:
        """What the manifest calls it."""

    @property
    def known_as(self) -> str:
        """What people call it, for messages that list what is supported."""

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The ``_class_name`` of the folders that can be its own."""

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders inside such a folder that it reads."""

    def has_folder(self, folder: Folder) -> bool:
        """Whether a folder, which says that it is one of ``pipelines``, is of this family."""

    def load_folder(self, folder: Folder) -> Checkpoint:
        """Load it; raises CheckpointError where it does not match its configuration."""

    def has_file(self, file: SingleFile) -> bool:
        """Whether a single file is of this family, by the names and shapes of its tensors."""

    def load_file(self, file: SingleFile) -> Checkpoint:
        """Load it; raises CheckpointError where its tensors are not exactly the family's."""
