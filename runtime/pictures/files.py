"""Picture files: read whatever their mode, written with their settings where people's tools look for them.

PNG has a text chunk ``parameters``, JPEG and WebP an EXIF ``UserComment``, both in the form that AUTOMATIC1111's web
interface writes (https://github.com/AUTOMATIC1111/stable-diffusion-webui).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from calotype.runtime.errors import InputError, OutputError
from calotype.runtime.version import __version__

logger = logging.getLogger(__name__)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
UNICODE = b"UNICODE\x00"
# JPEG has 65,533 bytes for EXIF; a prompt and a negative prompt of this many characters fit at four bytes each.
JPEG_PROMPT = 8000
# Above this Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485
# What Pillow raises for damaged files, depending on where the damage is.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """What made a picture; ``further`` is what else was asked for, by its label."""

    prompt: str
    negative_prompt: str = ""
    steps: int
    sampler: str
    guidance_scale: float
    seed: int
    width: int
    height: int
    model: str
    model_hash: str
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        settings = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": self.guidance_scale,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": self.model,
            **self.further,
            "Version": f"calotype {__version__}",
        }
        lines.append(", ".join(f"{name}: {_quoted(_text(value))}" for name, value in settings.items()))
        return "\n".join(lines)


def load_image(path: Path | io.BytesIO, name: str | None = None) -> Image.Image:
    """Read a picture file, or the content of one, as RGB; see :func:`to_rgb`. What is too large is not decoded.

    Raises:
        InputError: there is none, it is no picture, or it has more than ``MAX_PIXELS`` pixels.
    """
    named = path if name is None else name
    too_large = InputError(f"{named} has more than {MAX_PIXELS} pixels; scale it down first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is an error here
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise too_large
            return to_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{named} does not exist") from None
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise too_large from None
    except UNREADABLE as error:
        raise InputError(f"{named} is not a picture that can be read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, in RGB; 16 bits become 8, transparency white, of several frames the first stays.

    Raises:
        InputError: its pixels are floating-point numbers, which have no agreed white.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise InputError("the picture has floating-point pixels; save it with 8 or 16 bits")
    if upright.mode.startswith("I"):  # Pillow's own conversion of 16 bits clips them
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover ``width`` x ``height`` and cropped evenly from both sides of what is left over."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def save_image(image: Image.Image, path: Path, parameters: Parameters, *, overwrite: bool = False) -> None:
    """Write a picture whole or not at all; the suffix chooses PNG, JPEG or WebP.

    Raises:
        OutputError: an unknown suffix, a file in the way, or a folder that cannot be written or is full.
    """
    kind = check_target(path)
    options: dict[str, Any] = {"format": kind}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        text = str(parameters)
        if text.isascii():
            info.add_text("parameters", text)
        else:
            info.add_itxt("parameters", text)
        options["pnginfo"] = info
    else:
        exif = Image.Exif()
        text = str(_shortened(parameters, path) if kind == "JPEG" else parameters)
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be")
        options |= {"exif": exif, "quality": 95}
    encoded = io.BytesIO()  # into a file Pillow's JPEG encoder writes itself, and passes over a disk that is full
    image.save(encoded, **options)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(encoded.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if overwrite:
            temporary.replace(path)
        else:
            _rename_new(temporary, path)
    except FileExistsError:
        raise OutputError(f"{path} exists; use --overwrite, or another name") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; choose another folder") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def file_hash(path: Path) -> str:
    """The first ten digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def check_target(path: Path) -> str:
    """The format that the suffix of ``path`` names; raises OutputError where it names none or cannot be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a picture in it: {path / 'picture.png'}")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{path} has no suffix that names a picture format; valid: {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission in {path.parent}; choose another folder")
    return kind


def numbered_paths(path: Path, count: int, *, overwrite: bool = False) -> list[Path]:
    """``path`` itself for one picture, else ``name-0.png``, ``name-1.png`` …, passing over names that are taken."""
    if count == 1 and (overwrite or not path.exists()):
        return [path]
    paths: list[Path] = []
    number = 0
    while len(paths) < count:
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if overwrite or not candidate.exists():
            paths.append(candidate)
        number += 1
    return paths


def read_parameters(path: Path) -> str:
    """The settings text in a picture of ours or of AUTOMATIC1111's.

    Raises:
        InputError: the file is no picture, or carries none.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get("parameters")
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UNREADABLE as error:
        raise InputError(f"{path} is not a picture that can be read: {error}") from error
    if isinstance(text, str):
        return text
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        return comment.removeprefix(UNICODE).decode("utf-16-be", errors="replace")
    raise InputError(f"{path} carries no settings; pictures made by Calotype or AUTOMATIC1111 do")


def _shortened(parameters: Parameters, path: Path) -> Parameters:
    if max(len(parameters.prompt), len(parameters.negative_prompt)) <= JPEG_PROMPT:
        return parameters
    logger.warning("%s holds the first %d characters of the prompt; PNG and WebP hold all", path, JPEG_PROMPT)
    return dataclasses.replace(
        parameters,
        prompt=parameters.prompt[:JPEG_PROMPT],
        negative_prompt=parameters.negative_prompt[:JPEG_PROMPT],
    )


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # FAT, exFAT and some network folders have no hard links
        if path.exists():
            raise FileExistsError from None
        temporary.replace(path)


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(_text(item) for item in value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
