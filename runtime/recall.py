"""From the settings that a picture carries back to the request that made it.

A picture is a stranger's data: no path in it is ever opened. It names models, LoRAs and pictures with their hashes, and
what has such a hash is looked for in folders that the user names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from calotype.runtime.control import Control
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.families import FAMILIES, family_of
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.ip_adapters import KEYS_VALUES
from calotype.runtime.networks import CONTROLNETS, T2I_ADAPTER
from calotype.runtime.pictures.opening import opened
from calotype.runtime.pictures.parameters import Parameters, parse_parameters
from calotype.runtime.pictures.reading import Source, to_rgb
from calotype.runtime.request import Request
from calotype.runtime.text.textual_inversion import Embedding
from calotype.runtime.untrusted import parse_json, why

# "NAME:SCALE HASH" or "NAME:WORD HASH", and a space before the next.
FILE = re.compile(r"(.+?):([^\s:]+) ([0-9a-f]{10})(?: |$)")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MOST_FILES = 10_000  # looked at in the folders that a user names
MOST_NAMED = 64  # of one kind, by one picture; as many LoRAs as it takes
T = TypeVar("T")


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
        request=_request(
            found, further, image, mask_image, loras, {**_conditions(folders, further), "references": references}
        ),
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
    conditions: Mapping[str, tuple[Any, ...]],
) -> Request:
    try:
        interval = int(further.get("Cache interval", 1))
        config = {**parse_json(further.get("Scheduler settings", "{}").encode())}
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
            **conditions,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(error) from None


def _conditions(folders: Sequence[Path], further: Mapping[str, str]) -> dict[str, tuple[Any, ...]]:
    """The ControlNets and IP-Adapters that the picture names, and their pictures, found by their hashes."""
    return {
        field: _listed_by_number(folders, further, label, read)
        for field, label, read in (("controls", "ControlNets", _control), ("image_prompts", "IP-Adapters", _prompt))
    }


def _listed_by_number(
    folders: Sequence[Path],
    further: Mapping[str, str],
    label: str,
    read: Callable[[Sequence[Path], int, dict[str, Any]], T],
) -> tuple[T, ...]:
    try:
        listed = parse_json(further.get(label, "{}").encode())
        _check_number(label, len(listed))
        return tuple(read(folders, number, dict(fields)) for number, fields in enumerate(listed.values()))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(error, label) from None


def _control(folders: Sequence[Path], number: int, fields: dict[str, Any]) -> Control:
    name, digest = str(fields.pop("model")), str(fields.pop("model_hash"))
    picture, picture_hash = fields.pop("image", None), fields.pop("image_hash", None)
    image = None
    if picture is not None or picture_hash is not None:
        image = _picture(folders, f"control {number}", picture, str(picture_hash))
    return Control(model=_bundle(folders, name, digest), image=image, **fields)


def _prompt(folders: Sequence[Path], number: int, fields: dict[str, Any]) -> ImagePrompt:
    name, digest = str(fields.pop("model")), str(fields.pop("model_hash"))
    pictures = fields.pop("images")
    _check_number("IP-Adapters", len(pictures))
    pairs = zip(pictures, fields.pop("image_hashes"), strict=True)
    images = tuple(_picture(folders, f"image prompt {number}", picture, str(own)) for picture, own in pairs)
    return ImagePrompt(model=_bundle(folders, name, digest), images=images, **fields)


def _damaged(error: Exception, label: str | None = None) -> InputError:
    """What is wrong with the settings; a KeyError is a setting that is not there."""
    reason = f"{quoted(error.args[0])} is missing" if isinstance(error, KeyError) and error.args else why(error)
    where = "" if label is None else f" at {label}"
    return InputError(
        f"the picture's settings are damaged{where}: {reason}; draw it anew, with what calotype info shows of them"
    )


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
    text, position, found = further.get(label, ""), 0, []
    while position < len(text):
        match = FILE.match(text, position)
        if match is None:
            raise InputError(f"the picture's settings are damaged at {label}: {quoted(text[position:])}")
        found.append((match[1], match[2], match[3]))
        position = match.end()
        _check_number(label, len(found))
    return found


def _check_number(label: str, count: int) -> None:
    """For each of them folders are looked through, and files of the right name read."""
    if count > MOST_NAMED:
        raise InputError(f"the picture's settings name more than {MOST_NAMED} files at {label}; draw it anew")


def _check_source(given: Path | None, label: str, digest: str | None, name: str | None) -> None:
    """Raises InputError where the picture started from a file that is not ``given``."""
    option = label.lower()
    if digest is None:
        if given is not None:
            raise InputError(f"the picture started from no {option}; leave --{option} out")
        return
    if given is None:
        raise InputError(f"the picture started from {quoted(name or 'a file')}; give that file as --{option}")
    if not _is_picture(given, digest):
        raise InputError(f"{given} is not the {option} that the picture started from: its hash is not {digest}")


def _picture(folders: Sequence[Path], what: str, name: object, digest: str) -> Path:
    """The file of a control's picture: of its name, or of any; what was no file is known by its pixels."""
    files = [path for path in _files(folders) if path.suffix.lower() in PICTURES and path.is_file()]
    for path in sorted(files, key=lambda path: path.name != name):
        if _is_picture(path, digest):
            return path
    where = ", ".join(map(str, folders)) or "no folder"
    known = "was no file" if name is None else f"was {quoted(str(name))}"
    raise InputError(
        f"the picture of {what} {known}, and no picture in {where} has its hash {digest}; put it into a folder, as PNG "
        "where it was no file, and name that folder with --folder"
    )


def _is_picture(path: Path, digest: str) -> bool:
    """Whether a file has that hash, or the pixels of a picture that was none."""
    from calotype.runtime.picture import digest_of

    if digest_of(path) == digest:
        return True
    try:
        with opened(path) as image:
            return digest in (digest_of(image), digest_of(to_rgb(image)))
    except InputError:
        return False  # no picture, or none that can be read


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
    if not folders:
        raise InputError(f"the picture needs the file {quoted(name)}; name the folder that holds it with --folder")
    where = ", ".join(map(str, folders))
    what = f"{others} of that name, none with its hash {digest}" if others else "no file of that name"
    message = f"the picture needs the file {quoted(name)}, and there is {what} in {where}"
    raise InputError(f"{message}; name the folder that holds it with --folder")


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
            network = next((name for name in (*CONTROLNETS, T2I_ADAPTER) if name in manifest.networks), T2I_ADAPTER)
        elif manifest.kind == "ip-adapter":
            network = KEYS_VALUES
        else:
            network = family_of(manifest.family).denoiser if manifest.family in FAMILIES else "vae_decoder"
        spec = manifest.networks.get(network)
        own = None if spec is None else manifest.files[spec.weights[0]].sha256[:10]
        if own == digest or (digest is None and manifest.name == name):
            return place
    where = ", ".join([*map(str, folders), "the bundled models"])
    which = quoted(name) if digest is None else f"{quoted(name)} with the hash {quoted(digest)[1:-1]}"
    raise InputError(
        f"the picture needs the model {which}, which is not in {where}; name the folder that holds it with --folder"
    )
