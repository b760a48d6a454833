"""From the settings that a picture carries back to the request that made it.

A picture is a stranger's data: no path in it is ever opened. It names models, LoRAs and pictures with their hashes, and
what has such a hash is looked for in folders that the user names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from calotype.runtime.control import Control
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.families import FAMILIES, family_of
from calotype.runtime.networks import CONTROLNET
from calotype.runtime.pictures.parameters import Parameters, parse_parameters
from calotype.runtime.pictures.reading import Source
from calotype.runtime.request import Request
from calotype.runtime.text.textual_inversion import Embedding

# "NAME:SCALE HASH" or "NAME:WORD HASH", and a space before the next.
FILE = re.compile(r"(.+?):([^\s:]+) ([0-9a-f]{10})(?: |$)")
MOST_FILES = 10_000  # looked at in the folders that a user names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalled:
    """What it takes to draw a picture again.

    Attributes:
        request: what was asked for.
        model: the folder of its bundle.
        embeddings: words of textual inversion.
        vae: the folder of another autoencoder's bundle; None is the model's own.
        tiled: whether large pictures went through the autoencoder in tiles.
    """

    request: Request
    model: Path
    embeddings: tuple[Embedding, ...] = ()
    vae: Path | None = None
    tiled: bool = False


def recall(
    text: str,
    folders: Sequence[Path] = (),
    *,
    image: Path | None = None,
    mask_image: Path | None = None,
) -> Recalled:
    """Read the settings that Calotype wrote into a picture.

    Args:
        text: see :func:`calotype.runtime.pictures.embedded.read_parameters`.
        folders: where bundles, LoRAs and embeddings are looked for, with their sub-folders.
        image: the picture that it started from, where it did.
        mask_image: the mask that it had.

    Raises:
        InputError: another program wrote them, something is not found, or a file is not the one that was used.
    """
    found = parse_parameters(text)
    if not (found.version or "").startswith("calotype"):
        program = "another program" if found.version is None else quoted(found.version)
        raise InputError(
            f"the picture was made by {program}, whose pictures cannot be "
            "made again exactly; calotype info shows its settings"
        )
    further = dict(found.further)
    loras = tuple(
        Lora(path=_file(folders, name, digest), scale=float(scale)) for name, scale, digest in _listed(further, "Lora")
    )
    words = tuple(
        Embedding.parse(f"{_file(folders, name, digest)}:{token}") for name, token, digest in _listed(further, "TI")
    )
    for given, label in ((image, "Image"), (mask_image, "Mask")):
        _check_source(given, label, further.get(f"{label} hash"), further.get(label))
    references = tuple(_reference(folders, name, digest) for name, _, digest in _listed(further, "References"))
    vae = further.get("VAE")
    return Recalled(
        request=_request(found, further, image, mask_image, loras, _controls(folders, further), references),
        model=_bundle(folders, found.model, found.model_hash),
        embeddings=words,
        vae=None if vae is None else _bundle(folders, vae, further.get("VAE hash")),
        tiled=further.get("VAE tiles") == "True",
    )


def _request(
    found: Parameters,
    further: Mapping[str, str],
    image: Source | None,
    mask: Source | None,
    loras: tuple[Lora, ...],
    controls: tuple[Control, ...],
    references: tuple[Path, ...],
) -> Request:
    try:
        interval = int(further.get("Cache interval", 1))
        config = {**json.loads(further.get("Scheduler settings", "{}"))}
        if "Schedule type" in further:
            config["sigma_spacing"] = further["Schedule type"]
        if "Eta" in further:
            config["eta"] = float(further["Eta"])
        return Request(
            prompt=found.prompt,
            negative_prompt=found.negative_prompt,
            seed=found.seed,
            height=found.height,
            width=found.width,
            num_inference_steps=found.steps,
            timesteps=_numbers(further, "Timesteps", float),
            sigmas=_numbers(further, "Sigmas", float),
            scheduler=found.sampler,
            scheduler_config=config,
            guidance_scale=found.guidance_scale,
            guidance_rescale=float(further.get("CFG rescale", 0)),
            guidance_interval=_numbers(further, "CFG interval", float),
            fast=Acceleration(cache_interval=interval, precision=further.get("Precision")),
            clip_skip=int(further.get("Clip skip", 1)) - 1,
            image=image,
            mask_image=mask,
            strength=None if image is None else float(further["Denoising strength"]),
            feather=int(further.get("Feather", 0)),
            original_size=_numbers(further, "Original size", int),
            crops_coords_top_left=_numbers(further, "Crop", int),
            target_size=_numbers(further, "Target size", int),
            loras=loras,
            controls=controls,
            references=references,
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the picture's settings are damaged: {error}") from None


def _controls(folders: Sequence[Path], further: Mapping[str, str]) -> tuple[Control, ...]:
    """The ControlNets that the picture names, and their pictures, found by their hashes."""
    try:
        listed = json.loads(further.get("ControlNets", "{}"))
        found = []
        for fields in listed.values():
            rest = dict(fields)
            name, digest = str(rest.pop("model")), str(rest.pop("model_hash"))
            picture, picture_hash = rest.pop("image", None), rest.pop("image_hash", None)
            if picture is None and picture_hash is not None:
                raise InputError("a control's picture was no file, and cannot be found again; give it in Python")
            image = None if picture is None else _file(folders, str(picture), str(picture_hash))
            found.append(Control(model=_bundle(folders, name, digest), image=image, **rest))
        return tuple(found)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"the picture's settings are damaged at ControlNets: {error}") from None


def _reference(folders: Sequence[Path], name: str, digest: str) -> Path:
    """The file of a reference picture, found by its hash."""
    from calotype.runtime.picture import NO_FILE

    if name == NO_FILE:
        raise InputError("a reference picture was no file, and cannot be found again; give it in Python")
    return _file(folders, name, digest)


def _numbers(further: Mapping[str, str], label: str, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    return tuple(kind(item) for item in further[label].split()) if label in further else None


def _listed(further: Mapping[str, str], label: str) -> list[tuple[str, str, str]]:
    """Name, what follows its colon, and hash of each of the files under a label."""
    text, found = further.get(label, ""), []
    while text:
        match = FILE.match(text)
        if match is None:
            raise InputError(f"the picture's settings are damaged at {label}: {quoted(text)}")
        found.append((match[1], match[2], match[3]))
        text = text[match.end() :]
    return found


def _check_source(given: Path | None, label: str, digest: str | None, name: str | None) -> None:
    """Raises InputError where the picture started from a file that is not ``given``."""
    from calotype.runtime.picture import digest_of

    option = label.lower()
    if digest is None:
        if given is not None:
            raise InputError(f"the picture started from no {option}; leave --{option} out")
        return
    if given is None:
        raise InputError(f"the picture started from {quoted(name or 'a file')}; give that file as --{option}")
    if digest_of(given) != digest:
        raise InputError(f"{given} is not the {option} that the picture started from: its hash is not {digest}")


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    """Every file and folder in ``folders``, so many and no more."""
    count = 0
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; name one that holds models or LoRAs")
        for path in sorted(folder.rglob("*")):
            count += 1
            if count > MOST_FILES:
                raise InputError(f"{folder} holds more than {MOST_FILES} files; name a smaller folder")
            yield path


def _file(folders: Sequence[Path], name: str, digest: str) -> Path:
    """The file of that name and hash in ``folders``."""
    from calotype.runtime.picture import digest_of

    others = 0
    for path in _files(folders):
        if path.name == name:
            if digest_of(path) == digest:
                return path
            others += 1
    where = ", ".join(map(str, folders)) or "no folder"
    what = f"{others} of that name, none with its hash {digest}" if others else "no file of that name"
    shown = quoted(name)
    raise InputError(f"the picture needs {shown}; in {where} there is {what}; name its folder with --folder")


def _bundle(folders: Sequence[Path], name: str | None, digest: str | None) -> Path:
    """The bundle of that name, and of that hash of its denoising network's weights."""
    places = [path.parent for path in _files(folders) if path.name == MANIFEST_NAME]
    places += [folder for folder in folders if (folder / MANIFEST_NAME).is_file()]
    places += sorted(path for path in BUNDLED.glob("*") if path.is_dir())
    for place in places:
        try:
            manifest = Manifest.read(place)
        except BundleError:
            continue
        if manifest.kind == "control":
            network = CONTROLNET
        else:
            network = family_of(manifest.family).denoiser if manifest.family in FAMILIES else "vae_decoder"
        spec = manifest.networks.get(network)
        own = None if spec is None else manifest.files[spec.weights[0]].sha256[:10]
        if own == digest or (digest is None and manifest.name == name):
            return place
    where = ", ".join(map(str, folders)) or "the bundled models"
    raise InputError(
        f"the picture needs the model {quoted(name)} with the hash {digest}, which is not in {where}; "
        "name the folder that holds it with --folder"
    )
