"""Checkpoints in the original layout, one file for all components: their tensors, sorted by component."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from calotype.export.contents import read_tensors
from calotype.export.json_files import read_small
from calotype.export.models.autoencoder import Autoencoder
from calotype.export.single_file_configs import Part, UNetMarks, unet_marks, vae_config
from calotype.export.single_file_keys import vae_table
from calotype.export.towers import Tower, find_towers
from calotype.export.weights import listed, load_module
from calotype.runtime.errors import CheckpointError

# One tensor of each component that every model has, by which what its names begin with is found.
_UNET = "input_blocks.0.0.weight"
_AUTOENCODER = "decoder.mid.block_1.conv1.weight"
# Tensors that real files carry and no forward pass reads.
_STRAYS = re.compile(
    # The noise schedule, which follows from the family's settings.
    r"(model\.)?(alphas_cumprod(_prev)?|betas|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)"
    r"|denoiser\.sigmas"
    # Marks of velocity prediction and of a schedule that ends in pure noise, read before the tensors are.
    r"|v_pred|ztsnr"
    # Averaged weights, taken on request, and the discriminator that the autoencoder was trained against.
    r"|(first_stage_model\.)?(model_ema|loss)\..*"
    # Textual inversion, in files that were trained with it.
    r"|embedding_manager\..*"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleFile:
    """One file, and what was asked for with it.

    Attributes:
        path: the file.
        state: its tensors.
        metadata: its header's.
        ema: whether the averaged UNet is to be taken, which some files carry beside the last one.
        prediction_type: what its UNet predicts; None leaves it to the file.
        image_encoder: the folder of the image encoder that an IP-Adapter reads; None looks beside the file.
    """

    path: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    ema: bool = False
    prediction_type: str | None = None
    image_encoder: Path | None = None

    @classmethod
    def open(
        cls, path: Path, *, ema: bool = False, prediction_type: str | None = None, image_encoder: Path | None = None
    ) -> Self:
        """Read the file.

        Raises:
            CheckpointError: it cannot be read, or holds more than tensors.
        """
        state, metadata = read_tensors(path)
        return cls(
            path=path,
            state=state,
            metadata=metadata,
            ema=ema,
            prediction_type=prediction_type,
            image_encoder=image_encoder,
        )

    @property
    def card(self) -> Mapping[str, Any]:
        """What the metadata says for the manifest."""
        return {"license": self.metadata["modelspec.license"]} if "modelspec.license" in self.metadata else {}

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the checkpoint comes from, for the manifest."""
        return {"layout": "single-file", "name": self.path.stem}

    @cached_property
    def settings_beside(self) -> str:
        """The text of a ``.yaml`` of the same name beside the file, as the originals' code reads; empty without one."""
        beside = [self.path.with_suffix(suffix) for suffix in (".yaml", ".yml")]
        found = next((path for path in beside if path.exists()), None)
        return "" if found is None else read_small(found).decode("utf-8", errors="replace")

    @cached_property
    def unet(self) -> Part:
        """The UNet's tensors; none where there is no UNet."""
        return self.part(_UNET)

    @cached_property
    def marks(self) -> UNetMarks | None:
        """What the UNet's tensors tell of its family; None where it reads no context, or there is none."""
        return unet_marks(self.unet)

    @cached_property
    def autoencoder(self) -> Part:
        """The autoencoder's tensors; none where there is none."""
        return self.part(_AUTOENCODER)

    @cached_property
    def towers(self) -> list[Tower]:
        """The text encoders, that with a pooled prompt last."""
        return find_towers(self.state)

    def averaged_unet(self) -> Part:
        """The UNet's tensors from ``model_ema``, where names are spelt without their dots.

        Raises:
            CheckpointError: some are missing.
        """
        names = {name: f"{self.unet.prefix}{name}".removeprefix("model.").replace(".", "") for name in self.unet}
        averaged = {name: self.state.get(f"model_ema.{spelt}") for name, spelt in names.items()}
        found = Part("", {name: tensor for name, tensor in averaged.items() if tensor is not None})
        found.prefix = "model_ema."
        if len(found) < len(averaged):
            raise CheckpointError(
                f"{self.path} has averaged weights for {len(found)} of the UNet's {len(averaged)} tensors; "
                "export without --ema"
            )
        return found

    def load_autoencoder(self, scaling_factor: float | None) -> Autoencoder:
        """The autoencoder, whose latents' scale no tensor tells."""
        if not self.autoencoder:
            raise CheckpointError(
                f"{self.path} has no autoencoder; fetch this model with its autoencoder (VAE) baked in"
            )
        config = vae_config(self.autoencoder, scaling_factor=scaling_factor)
        return load_module(Autoencoder, config, self.autoencoder, "autoencoder", vae_table(config))

    def check_strangers(self, parts: Iterable[Part], towers: Iterable[Tower] = ()) -> None:
        """Raise CheckpointError where a tensor is of none of the components that are read, and is no known stray."""
        prefixes, towers = tuple(part.prefix for part in parts), list(towers)
        strangers = sorted(
            name
            for name in self.state
            if not name.startswith(prefixes)
            and not _STRAYS.fullmatch(name)
            and not any(tower.claims(name) for tower in towers)
        )
        if strangers:
            raise CheckpointError(
                f"{self.path} has {len(strangers)} unexpected tensors: {listed(strangers)}; they are of no part of the "
                "model that is read, so it may need more than those: take the publisher's own"
            )

    def part(self, mark: str) -> Part:
        """The tensors of the component that has one called ``mark``; none where there is none."""
        # An own component before one that goes beside a model, as a ControlNet's.
        found = sorted((name.removesuffix(mark) for name in self.state if name.endswith(mark)), key=len, reverse=True)
        prefixes = [prefix for prefix in found if not prefix or prefix.endswith(".")]
        if not prefixes:
            return Part(mark, {})
        return Part(prefixes[0], {name: tensor for name, tensor in self.state.items() if not _STRAYS.fullmatch(name)})
