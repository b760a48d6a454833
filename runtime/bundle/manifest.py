"""``calotype.json``: what a bundle says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BundleError

MANIFEST_NAME = "calotype.json"
FORMAT_VERSION = 1
FAMILIES = ("sd1", "sd2", "sdxl", "vae")
# What deep-feature caching takes in place of the UNet; bundles exported before there was any have not got them.
CACHING = ("unet_deep", "unet_shallow")
NETWORKS = ("text_encoder", "text_encoder_2", "unet", *CACHING, "vae_decoder", "vae_encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure ``path``."""
        with path.open("rb") as file:
            return cls(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A CLIP byte-pair tokenizer: its two files, its length and its special tokens."""

    vocab: str
    merges: str
    max_length: int = 77
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """How latents of the UNet relate to latents of the autoencoder, and those to pixels.

    ``vae_latents = latents / scaling_factor + shift_factor``; a latent spans ``downscale`` pixels each way. An
    autoencoder alone may not say its scale, None: it is that of the model which it is used with.
    """

    scaling_factor: float | None
    shift_factor: float = 0.0
    latent_channels: int = 4
    downscale: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a call uses where it says nothing; sizes in pixels. ``scheduler`` None is the checkpoint's own."""

    height: int
    width: int
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime knows of a bundle before it opens a graph.

    The family ``vae`` is an autoencoder alone: no text encoder, no UNet, no tokenizer, an empty ``scheduler``.
    ``max_clip_skip`` is how many of their last layers the text encoders can leave out.
    """

    name: str
    family: str
    precision: str
    networks: Mapping[str, ModelSpec]
    tokenizers: Mapping[str, TokenizerSpec]
    scheduler: Mapping[str, Any]
    vae: VaeSpec
    defaults: Defaults
    files: Mapping[str, FileRecord]
    max_clip_skip: int = 0
    force_zeros_for_empty_prompt: bool = False
    license: str | None = None
    attribution: tuple[str, ...] = ()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise BundleError(f"the manifest names the family {self.family!r}; valid: {', '.join(FAMILIES)}")
        for network in self.networks:
            if network not in NETWORKS:
                raise BundleError(f"the manifest names the network {network!r}; valid: {', '.join(NETWORKS)}")
        for path in (*self.files, *self._referenced()):
            if not _is_inside(path):
                raise BundleError(f"the manifest points outside its bundle: {path!r}")
        missing = sorted(set(self._referenced()) - set(self.files))
        if missing:
            raise BundleError(f"the manifest has no checksum of {', '.join(missing)}; export the bundle again")

    def _referenced(self) -> list[str]:
        paths = [path for tokenizer in self.tokenizers.values() for path in (tokenizer.vocab, tokenizer.merges)]
        for network in self.networks.values():
            paths += [*network.graphs.values(), *network.weights]
        return paths

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read a parsed ``calotype.json``.

        Raises:
            BundleError: when it is of another format version, misses a field, has an unknown one, or a wrong type.
        """
        if not isinstance(value, dict) or "format_version" not in value:
            raise BundleError(f"{MANIFEST_NAME} is not a Calotype manifest: it has no format_version")
        fields = dict(value)
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME} has format version {version!r}, this Calotype reads {FORMAT_VERSION}; "
                "export the bundle again or install the Calotype that wrote it"
            )
        unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise BundleError(f"{MANIFEST_NAME} has unknown fields: {', '.join(unknown)}")
        try:
            fields["networks"] = {name: ModelSpec.from_json(item) for name, item in fields["networks"].items()}
            fields["tokenizers"] = {name: TokenizerSpec(**item) for name, item in fields["tokenizers"].items()}
            fields["vae"] = VaeSpec(**fields["vae"])
            fields["defaults"] = Defaults(**fields["defaults"])
            fields["files"] = {name: FileRecord(**item) for name, item in fields["files"].items()}
            fields["attribution"] = tuple(fields.get("attribution", ()))
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{MANIFEST_NAME} is not a valid manifest: {error}; export the bundle again") from error

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        value["networks"] = {name: network.to_json() for name, network in self.networks.items()}
        for name in ("tokenizers", "files"):
            value[name] = {key: dataclasses.asdict(item) for key, item in value[name].items()}
        for name in ("vae", "defaults"):
            value[name] = dataclasses.asdict(value[name])
        value["attribution"] = list(self.attribution)
        for name in ("scheduler", "source", "parity"):
            value[name] = dict(value[name])
        return {"format_version": FORMAT_VERSION, **value}

    def dumps(self) -> str:
        """The manifest as it stands on disk. JSON has no NaN: a figure that is not finite is written as null."""
        return json.dumps(_finite(self.to_json()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read the manifest of the bundle in the folder ``bundle``; file contents are not checked here."""
        path = bundle / MANIFEST_NAME
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            what = "is a file" if bundle.is_file() else "has no calotype.json" if bundle.is_dir() else "does not exist"
            raise BundleError(
                f"{bundle} is not a bundle: it {what}; a checkpoint becomes one with: calotype export CHECKPOINT BUNDLE"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from error
        return cls.from_json(value)


def _is_inside(path: Any) -> bool:
    if not isinstance(path, str) or not path or "\\" in path:
        return False
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
