"""What comes out: pictures with their settings, and where the time went."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.arrays import Array
from calotype.runtime.bundle.form import Form
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.errors import InputError
from calotype.runtime.pictures.parameters import Parameters, file_hash
from calotype.runtime.pictures.writing import save_new
from calotype.runtime.request import Request
from calotype.runtime.text.textual_inversion import Embedding

logger = logging.getLogger(__name__)
Kind = Literal["pil", "np", "latent"]
KINDS = ("pil", "np", "latent")
NO_FILE, NO_HASH = "*", "0000000000"  # of a reference picture that was no file, or is none any more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a pipeline draws with beside a request.

    Attributes:
        name: the bundle's.
        digest: the first ten digits of the SHA-256 of the denoising network's weights.
        embeddings: words of textual inversion that prompts may use.
        vae: the name of the bundle whose autoencoder takes the place of the model's own; None is its own.
        vae_digest: the first ten digits of the SHA-256 of that one's weights.
        tiled: whether large pictures go through the autoencoder in tiles.
    """

    name: str
    digest: str
    embeddings: tuple[Embedding, ...] = ()
    vae: str | None = None
    vae_digest: str | None = None
    tiled: bool = False

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        denoiser: str,
        embeddings: Sequence[Embedding] = (),
        vae: Manifest | None = None,
        tiled: bool = False,
    ) -> Model:
        """The model of a bundle, and what was added to it when it was loaded."""
        return cls(
            name=manifest.name,
            digest=_weights_digest(manifest, denoiser),
            embeddings=tuple(embeddings),
            vae=None if vae is None else vae.name,
            vae_digest=None if vae is None else _weights_digest(vae, "vae_decoder"),
            tiled=tiled,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that it takes to make a picture again.

    Attributes:
        request: what was asked for, every default filled in.
        model: what it was drawn with.
        form: what the denoising network was computed in.
        controlnets: name and hash of what each of the request's controls is of.
        ip_adapters: name and hash of the IP-Adapter of each of its image prompts.
    """

    request: Request
    model: Model
    form: Form
    controlnets: tuple[tuple[str, str], ...] = ()
    ip_adapters: tuple[tuple[str, str], ...] = ()

    def parameters(self) -> Parameters:
        """The same as the text that a picture's file carries; the files that the request names are hashed for it."""
        request = self.request
        assert isinstance(request.fast, Acceleration)
        fields: Mapping[str, Any] = {
            name: getattr(request, name)
            for name in ("num_inference_steps", "scheduler", "guidance_scale", "seed", "width", "height")
        }
        assert None not in fields.values()
        further = {**_scheduling(request), **_conditions(request), **self._additions()}
        if self.form.compute == "int8":
            further["Precision"] = "int8"
        return Parameters(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            steps=fields["num_inference_steps"],
            sampler=fields["scheduler"],
            guidance_scale=fields["guidance_scale"],
            seed=fields["seed"],
            width=fields["width"],
            height=fields["height"],
            model=self.model.name,
            model_hash=self.model.digest,
            further={name: value for name, value in further.items() if value is not None},
        )

    def _additions(self) -> dict[str, Any]:
        merged = [own for own in self.request.loras or () if isinstance(own, Lora)]
        loras = [f"{own.path.name}:{_exactly(own.scale)} {own.digest or digest_of(own.path)}" for own in merged]
        words = [f"{own.path.name}:{own.token} {digest_of(own.path)}" for own in self.model.embeddings]
        return {
            "Lora": loras or None,
            "TI": words or None,
            "VAE": self.model.vae,
            "VAE hash": self.model.vae_digest,
            "VAE tiles": self.model.tiled or None,
            "ControlNets": self._controls() or None,
            "IP-Adapters": self._image_prompts() or None,
            "References": [_reference(own) for own in self.request.references] or None,
        }

    def _controls(self) -> dict[str, Any]:
        """By number: each control's ControlNet and picture, with their hashes, and what else is not its default."""
        found = {}
        for number, (control, (name, digest)) in enumerate(zip(self.request.controls, self.controlnets, strict=True)):
            image = control.image
            fields = {
                "model": name,
                "model_hash": digest,
                "image": image.name if isinstance(image, Path) else None,
                "image_hash": _digest_if_there(image),
                "scale": control.scale,
            }
            for field in dataclasses.fields(control):
                own = getattr(control, field.name)
                if field.name not in (*fields, "image") and own != field.default:
                    fields[field.name] = own
            found[str(number)] = {name: value for name, value in fields.items() if value is not None}
        return found

    def _image_prompts(self) -> dict[str, Any]:
        """By number: each image prompt's IP-Adapter and pictures, with their hashes, and its scale."""
        return {
            str(number): {
                "model": name,
                "model_hash": digest,
                "images": [image.name if isinstance(image, Path) else None for image in prompt.images],
                "image_hashes": [_digest_if_there(image) for image in prompt.images],
                "scale": prompt.scale,
            }
            for number, (prompt, (name, digest)) in enumerate(
                zip(self.request.image_prompts, self.ip_adapters, strict=True)
            )
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        image: a PIL image; or an array, (H, W, 3) in 0..1 or the latents (C, h, w), where the call asked for those.
        settings: what made it.
        flagged: whether the model's safety checker takes exception to it, and it is black; None where none looked.
    """

    image: Any
    settings: Settings
    flagged: bool | None = None

    @property
    def seed(self) -> int:
        """The seed that makes it again."""
        seed = self.settings.request.seed
        assert seed is not None
        return seed

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The pixels (H, W, 3) in uint8, for ``numpy.asarray``; or the array that was asked for."""
        return np.array(self.image, dtype=dtype)

    def save(self, path: str | Path, *, number: int | None = None, overwrite: bool = False) -> Path:
        """Write the picture with its settings, whole or not at all; the suffix chooses PNG, JPEG or WebP.

        Args:
            path: where; a name that is taken gives way to the next number, ``cat-1.png`` for ``cat.png``.
            number: of the picture among those of one call, which are ``cat-0.png``, ``cat-1.png`` and so on.
            overwrite: replace a picture of the name instead.

        Returns:
            Where it was written.

        Raises:
            OutputError: an unknown suffix, or a folder that cannot be written or is full.
            InputError: it is an array, not an image.
        """
        if not isinstance(self.image, Image.Image):
            raise InputError('only images are saved with their settings; ask for output_type="pil"')
        return save_new(self.image, Path(path), self.settings.parameters(), number=number, overwrite=overwrite)

    def __repr__(self) -> str:
        request = self.settings.request
        return (
            f"<Picture {request.width}x{request.height} of {request.prompt[:40]!r}, seed {request.seed}, "
            f"{request.num_inference_steps} steps of {request.scheduler}, {self.settings.model.name}>"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the seconds of a call went.

    Attributes:
        text_encoder: in encoding prompts.
        vae_encoder: in encoding pictures to start from.
        denoising: in the loop.
        vae_decoder: in turning latents into pixels.
        total: from the call to its return.
        runs: in each run of the denoising network, with the host's share of it.
    """

    text_encoder: float = 0.0
    vae_encoder: float = 0.0
    denoising: float = 0.0
    vae_decoder: float = 0.0
    total: float = 0.0
    runs: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "runs": list(self.runs)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The pictures of a call, in its order, and where the time went; those that were not finished are missing.

    Attributes:
        pictures: each with its settings.
        timings: of the call.
    """

    pictures: list[Picture]
    timings: Timings

    @property
    def images(self) -> list[Any]:
        """The images, or the arrays that were asked for."""
        return [picture.image for picture in self.pictures]

    @property
    def seeds(self) -> list[int]:
        """The seed of each."""
        return [picture.seed for picture in self.pictures]

    def __repr__(self) -> str:
        return f"<Output of {len(self.pictures)} pictures in {self.timings.total:.2f} s: {self.pictures!r}>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEnd:
    """What a callback sees after a step of a picture.

    Attributes:
        image: which picture of the call, from 0.
        step: how many of its steps are done.
        steps: how many it has.
        latents: (C, h, w) float32, a view that cannot be written to and changes with the next step; copy what is kept.
    """

    image: int
    step: int
    steps: int
    latents: Array


def _scheduling(request: Request) -> dict[str, Any]:
    """What of the schedule and the guidance a picture's file says."""
    config, fast = dict(request.scheduler_config), request.fast
    assert isinstance(fast, Acceleration)
    return {
        "Schedule type": config.pop("sigma_spacing", None),
        "Sigmas": request.sigmas,
        "Timesteps": request.timesteps,
        "Eta": config.pop("eta", None),
        "Scheduler settings": config or None,
        "CFG rescale": request.guidance_rescale or None,
        "CFG interval": request.guidance_interval,
        "Cache interval": fast.cache_interval if fast.caches else None,
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,
    }


def _conditions(request: Request) -> dict[str, Any]:
    """What of pictures to start from and of sizes a picture's file says."""
    image, mask = request.image, request.mask_image
    return {
        "Original size": request.original_size,
        "Crop": request.crops_coords_top_left,
        "Target size": request.target_size,
        "Image": image.name if isinstance(image, Path) else None,
        "Image hash": _digest_if_there(image),
        "Denoising strength": None if image is None else request.strength,
        "Mask": mask.name if isinstance(mask, Path) else None,
        "Mask hash": _digest_if_there(mask),
        "Feather": request.feather or None,
    }


def _reference(source: Any) -> str:
    """Name and hash of a reference picture, as files that are listed are written."""
    name = source.name if isinstance(source, Path) else NO_FILE
    return f"{name}:reference {_digest_if_there(source) or NO_HASH}"


def _exactly(number: float) -> str:
    """A number to its last digit, whole ones without a point."""
    return repr(float(number)).removesuffix(".0")


def _weights_digest(manifest: Manifest, network: str) -> str:
    return manifest.files[manifest.networks[network].weights[0]].sha256[:10]


def _digest_if_there(source: Any) -> str | None:
    """The digest of a picture to start from; None where its file is gone, which must not cost the picture drawn."""
    try:
        return digest_of(source)
    except OSError as error:
        logger.warning("%s cannot be read any more, so the picture's settings lack its hash: %s", source, error)
        return None


def digest_of(source: Any) -> str | None:
    """The first ten digits of the SHA-256 of a file, of a folder's files, or of a picture's pixels."""
    if isinstance(source, Image.Image):
        return hashlib.sha256(source.tobytes()).hexdigest()[:10]
    if not isinstance(source, Path):
        return None
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return _digest_of_files(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@functools.lru_cache(maxsize=64)
def _digest_of_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    if len(files) == 1:
        return file_hash(files[0][0])
    return hashlib.sha256("".join(file_hash(path) for path, _, _ in files).encode()).hexdigest()[:10]
