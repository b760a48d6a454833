"""``calotype.json``: what a bundle says of itself.

Format 2 is format 1 and two fields that a reader can do without: ``kind``, what the bundle is, and ``sha256``, a hash
over the rest. The hash catches accidents; whoever changes a bundle on purpose changes it too, and only a pin, the same
hash kept elsewhere, protects from that. What a kind has no use for, it leaves out. Format 1 is read as it always was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Self

from calotype.runtime.bundle.contracts import check_contract
from calotype.runtime.bundle.schema import (
    FilePath,
    Name,
    NetworkName,
    Plain,
    SchemaError,
    Sha256,
    Size,
    Text,
    Word,
    at_least_one,
    one_of,
    read_as,
    within,
)
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BundleError, quoted
from calotype.runtime.untrusted import open_regular, parse_json, read_bytes, why

MANIFEST_NAME = "calotype.json"
MOST_BYTES = 16 << 20  # of a manifest
MOST_VOCABULARY = 64 << 20  # bytes of a tokenizer's file
FORMAT_VERSION = 2
FORMATS = (1, 2)
# Kind of bundle -> what it cannot leave out, beside what every kind says.
KINDS: Mapping[str, frozenset[str]] = {
    "model": frozenset({"tokenizers", "scheduler", "vae", "defaults"}),
    "vae": frozenset({"vae"}),
    "control": frozenset(),
    "ip-adapter": frozenset(),
    "upscaler": frozenset(),
}
TOKENIZERS = ("clip", "byte-level")
# Where those of the second kind split a text, after it is normalised to NFC: as Qwen's do.
BYTE_LEVEL_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What deep-feature caching takes in place of the UNet; bundles exported before there was any have not got them.
CACHING = ("unet_deep", "unet_shallow")
# What takes the place of the UNet where ControlNets add to it.
CONTROLLED = "unet_control"
# What takes its place where image prompts are read beside the prompt; ControlNets add to it too.
PROMPTED = "unet_image_prompt"
# What says of a picture whether it is fit for everybody; in bundles that were exported with it.
SAFETY_CHECKER = "safety_checker"
# What takes the place of a transformer where it is given reference pictures.
EDITING = "transformer_edit"
# What pictures without these can do without: engines of it are built when it is named.
ASIDE = (*CACHING, CONTROLLED, PROMPTED, EDITING, SAFETY_CHECKER)


def _numbers(figures: Mapping[str, Any]) -> str | None:
    sound = all(type(figures.get(name)) in (int, float) for name in ("max_relative", "min_cosine"))
    return None if sound else "the numbers max_relative and min_cosine, and more"


Figures = Annotated[Mapping[Name, Plain], _numbers]
Pixels = Annotated[int, within(1, 65536)]
Token = Annotated[Name, at_least_one]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: Size
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure ``path``; raises OSError."""
        with open_regular(path) as file:
            return cls.of_file(file)

    @classmethod
    def of_file(cls, file: BufferedReader) -> Self:
        """Measure a file that is open, and was not read yet."""
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(size=file.tell(), sha256=digest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A byte-pair tokenizer: its two files, its length and its special tokens.

    ``kind`` is how it splits a text before: as CLIP's, or as those of language models. ``added_tokens`` are what it
    takes for one token wherever they stand, beside the three that are named.
    """

    vocab: FilePath
    merges: FilePath
    max_length: Annotated[int, within(3, 65536)] = 77
    bos_token: Token = "<|startoftext|>"
    eos_token: Token = "<|endoftext|>"
    pad_token: Token = "<|endoftext|>"
    kind: Annotated[str, one_of(*TOKENIZERS)] = "clip"
    added_tokens: tuple[Token, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it; what was not there in former versions is left out where it says nothing new."""
        value = dataclasses.asdict(self)
        for field in dataclasses.fields(self)[-2:]:
            if value[field.name] == field.default:
                del value[field.name]
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """How latents of the UNet relate to latents of the autoencoder, and those to pixels.

    ``vae_latents = latents / scaling_factor + shift_factor``; a latent spans ``downscale`` pixels each way. An
    autoencoder alone may not say its scale, None: it is that of the model which it is used with.
    """

    scaling_factor: Annotated[float, within(1e-6, 1e6)] | None
    shift_factor: Annotated[float, within(-1e6, 1e6)] = 0.0
    latent_channels: Annotated[int, within(1, 4096)] = 4
    downscale: Annotated[int, within(1, 256)] = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a call uses where it says nothing; sizes in pixels. ``scheduler`` None is the checkpoint's own."""

    height: Pixels
    width: Pixels
    num_inference_steps: Annotated[int, within(1, 1000)] = 50
    guidance_scale: Annotated[float, within(-1000, 1000)] = 7.5
    scheduler: Word | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime knows of a bundle before it opens a graph.

    ``kind`` None is ``vae`` where the family is, else ``model``. An autoencoder alone, kind and family ``vae``, has no
    text encoder, no UNet, no tokenizer, an empty ``scheduler``. ``max_clip_skip`` is how many of their last layers the
    text encoders can leave out. ``distilled`` is of a model that was taught to draw in few steps, and without guidance;
    where it is not, nothing is written, as before there was any. ``words`` is a file of all words that a small model
    was taught, one a line; None is no such list. Which families there are, those who open one know.

    Attributes:
        sha256: see :func:`digest`; of the file where it was read from one.
    """

    name: Name
    kind: Annotated[str, one_of(*KINDS)] | None = None
    family: Word
    precision: Word
    networks: Annotated[Mapping[NetworkName, ModelSpec], at_least_one]
    tokenizers: Mapping[NetworkName, TokenizerSpec] = dataclasses.field(default_factory=dict)
    scheduler: Mapping[Name, Plain] = dataclasses.field(default_factory=dict)
    vae: VaeSpec = VaeSpec(scaling_factor=None)
    defaults: Defaults = Defaults(height=512, width=512)
    files: Mapping[FilePath, FileRecord]
    max_clip_skip: Annotated[int, within(0, 1000)] = 0
    words: FilePath | None = None
    force_zeros_for_empty_prompt: bool = False
    distilled: bool = False
    license: Text | None = None
    attribution: tuple[Text, ...] = ()
    source: Mapping[Name, Plain] = dataclasses.field(default_factory=dict)
    parity: Mapping[NetworkName, Mapping[Word, Figures]] = dataclasses.field(default_factory=dict)
    sha256: str = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind is None:
            object.__setattr__(self, "kind", "vae" if self.family == "vae" else "model")
        missing = sorted(set(self._referenced()) - set(self.files))
        if missing:
            raise BundleError(f"the manifest has no checksum of {', '.join(missing[:8])}; export the bundle again")
        for name, spec in self.networks.items():
            check_contract(name, spec, self.vae.downscale)
        for name, tokenizer in self.tokenizers.items():
            self._check_length(name, tokenizer)
        object.__setattr__(self, "sha256", digest(self.to_json()))

    def _referenced(self) -> list[str]:
        paths = [path for tokenizer in self.tokenizers.values() for path in (tokenizer.vocab, tokenizer.merges)]
        for network in self.networks.values():
            paths += [*network.graphs.values(), *network.weights]
        return paths if self.words is None else [*paths, self.words]

    def _check_length(self, name: str, tokenizer: TokenizerSpec) -> None:
        encoder = self.networks.get(name.replace("tokenizer", "text_encoder"))
        ids = None if encoder is None else encoder.input("input_ids")
        if ids is not None and tokenizer.max_length not in ids.shape:
            raise BundleError(
                f"the manifest's {name} has max_length={tokenizer.max_length}, and its text encoder takes "
                f"{ids.shape[-1]}; export the bundle again"
            )

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read a parsed ``calotype.json``.

        Raises:
            BundleError: when it is of another format version, misses a field, has an unknown one, a wrong value, or
                was changed after it was written.
        """
        if not isinstance(value, dict) or "format_version" not in value:
            raise BundleError(f"{MANIFEST_NAME} is not a Calotype manifest: it has no format_version")
        version = value["format_version"]
        if type(version) is not int or version not in FORMATS:
            raise BundleError(
                f"{MANIFEST_NAME} has format version {quoted(version)}, this Calotype reads "
                f"{' and '.join(map(str, FORMATS))}; export the bundle again or install the Calotype that wrote it"
            )
        recorded = value.get("sha256") if version > 1 else None
        fields = {key: item for key, item in value.items() if key != "format_version"}
        if version > 1:
            fields.pop("sha256", None)
        try:
            found = read_as(cls, fields, MANIFEST_NAME)
            missing = sorted(KINDS[found.kind or "model"] - fields.keys())
            if missing:
                raise SchemaError(f"{MANIFEST_NAME} of a {found.kind} has no {', '.join(missing)}")
        except SchemaError as error:
            raise BundleError(
                f"{error}; it is not a valid manifest: export the bundle again, or install the Calotype that wrote it"
            ) from None
        object.__setattr__(found, "sha256", digest(value))
        if recorded not in (None, found.sha256):
            raise BundleError(
                f"{MANIFEST_NAME} was changed after it was written: it says its sha256 is {quoted(recorded)}, and it "
                f"is {found.sha256}; copy or export the bundle again, or take the field out if the change is yours"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads, without the hash. JSON has no NaN: a figure that is not finite is None."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        value["networks"] = {name: network.to_json() for name, network in self.networks.items()}
        value["tokenizers"] = {key: item.to_json() for key, item in self.tokenizers.items()}
        value["files"] = {key: dataclasses.asdict(item) for key, item in self.files.items()}
        if not self.distilled:
            del value["distilled"]
        for name in ("vae", "defaults"):
            value[name] = dataclasses.asdict(value[name])
        found: dict[str, Any] = _finite({"format_version": FORMAT_VERSION, **value})
        return found

    def dumps(self) -> str:
        """The manifest as it stands on disk.

        Raises:
            BundleError: it would not be read again.
        """
        value = self.to_json()
        value["sha256"] = digest(value)
        type(self).from_json(value)
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def read(bundle: Path) -> Manifest:
        """Read the manifest of the bundle in the folder ``bundle``; file contents are not checked here."""
        path = bundle / MANIFEST_NAME
        try:
            return _parsed(read_bytes(path, MOST_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            what = "is a file" if bundle.is_file() else "has no calotype.json" if bundle.is_dir() else "does not exist"
            raise BundleError(
                f"{bundle} is not a bundle: it {what}; a checkpoint becomes one with: calotype export CHECKPOINT BUNDLE"
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {why(error)}; export the bundle again") from error


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical form.

    That is its JSON without the field ``sha256``, keys sorted, without spaces, beyond ASCII in escapes, numbers as
    Python writes them.
    """
    rest = {key: item for key, item in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _parsed(data: bytes) -> Manifest:
    """Kept, since every network that is opened asks for it again."""
    return Manifest.from_json(parse_json(data))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
