"""An autoencoder alone, which is used in the place of a model's own."""

from __future__ import annotations

import dataclasses
import logging

from calotype.export.checkpoint import Checkpoint
from calotype.export.components import AUTOENCODERS, load_autoencoder
from calotype.export.folder import Folder
from calotype.export.graphs import vae_plans, vae_spec
from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.tiny_autoencoder import TinyAutoencoder
from calotype.export.single_file import SingleFile
from calotype.runtime.errors import InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderAlone:
    """Diffusers' folder of one ``AutoencoderKL`` or ``AutoencoderTiny``, or an original file without a UNet."""

    name: str = "vae"
    known_as: str = "an autoencoder of theirs"
    pipelines: tuple[str, ...] = AUTOENCODERS
    folders: tuple[str, ...] = ()

    def has_folder(self, folder: Folder) -> bool:
        """Every folder that says so."""
        return folder.alone

    def load_folder(self, folder: Folder) -> Checkpoint:
        """With the scale in its configuration."""
        return self._checkpoint(load_autoencoder(folder, ""), folder)

    def has_file(self, file: SingleFile) -> bool:
        """One with an autoencoder and no UNet."""
        return bool(file.autoencoder) and not file.unet

    def load_file(self, file: SingleFile) -> Checkpoint:
        """Autoencoders of SD 1.x, 2.x and XL are of one shape, and their latents of two scales."""
        if file.ema:
            raise InputError(
                f"{file.path} is an autoencoder alone, whose averaged weights are not read; export without --ema"
            )
        logger.warning(
            "%s does not say the scale of its latents (0.18215 in Stable Diffusion 1.x and 2.x, 0.13025 in SDXL); "
            "with generate --vae it is that of the model",
            file.path.name,
        )
        file.check_strangers([file.autoencoder])
        return self._checkpoint(file.load_autoencoder(None), file)

    def _checkpoint(self, vae: Autoencoder | TinyAutoencoder, source: Folder | SingleFile) -> Checkpoint:
        return Checkpoint(
            family=self.name,
            kind="vae",
            components={"vae": vae},
            graphs=tuple(vae_plans(vae)),
            vae=vae_spec(vae),
            card=source.card,
            source=source.source,
        )


VAE = AutoencoderAlone()
