"""Pictures on disk: whole or not at all, under a name that was free, with the settings that made them.

PNG has a text chunk ``parameters``, JPEG and WebP an EXIF ``UserComment``, both in the form that AUTOMATIC1111's web
interface writes; see :mod:`calotype.runtime.pictures.parameters`. All three say in XMP that a trained model made the
picture, in the words of the IPTC (https://cv.iptc.org/newscodes/digitalsourcetype).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from calotype.runtime.errors import OutputError, quoted
from calotype.runtime.pictures.new_file import NewFile
from calotype.runtime.pictures.parameters import Parameters, parse_parameters

logger = logging.getLogger(__name__)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
UNICODE = b"UNICODE\x00"
# JPEG has 65,533 bytes for EXIF; this leaves some for its own tables. Two bytes a character, some have four.
JPEG_BYTES = 65_000
QUALITY = 95  # of JPEG and WebP
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    "</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"
)
LONGEST_NAME = 255  # bytes, where the file system does not say


def check_target(path: Path) -> str:
    """The format that the suffix of ``path`` names; raises OutputError where it names none or cannot be written."""
    shown = quoted(str(path))[1:-1]
    if len(os.fsencode(path.name)) > _longest_name(path.parent):
        raise OutputError(f"{shown} is a name of more than {_longest_name(path.parent)} bytes; give a shorter one")
    if path.is_dir():
        raise OutputError(f"{shown} is a folder; name a picture in it: {path / 'picture.png'}")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{shown} has no suffix that names a picture format; valid: {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"{shown} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{shown} cannot be written: no permission in {path.parent}; choose another folder")
    return kind


def save_new(
    image: Image.Image, path: Path, parameters: Parameters, *, number: int | None = None, overwrite: bool = False
) -> Path:
    """Write a picture whole or not at all, and return the path that it took.

    Nothing that is there is touched, unless ``overwrite``: a name that is taken, also by another process at this
    moment, gives way to the next number. The suffix chooses PNG, JPEG or WebP.

    Args:
        image: in RGB.
        path: ``cat.png``, say.
        parameters: what made it.
        number: of the picture among those of one call, which are ``cat-0.png``, ``cat-1.png`` and so on; None is the
            only one, ``cat.png``, or else ``cat-1.png`` and so on.
        overwrite: replace a picture of the name.

    Raises:
        OutputError: an unknown suffix, or a folder that cannot be written or is full.
    """
    data = encode(image, check_target(path), str(parameters), name=str(path))
    try:
        with NewFile(path.parent, data) as file:
            return next(name for name in _names(path, number) if file.take(name.name, overwrite=overwrite))
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{path} cannot be written: {why}; choose another folder") from error


def _names(path: Path, number: int | None) -> Iterator[Path]:
    """What the picture may be called, the best name first; all of them are short enough for the file system."""
    if number is None:
        yield path
    longest = _longest_name(path.parent)
    for count in itertools.count(1 if number is None else number):
        end = f"-{count}{path.suffix}"
        stem = os.fsencode(path.stem)[: longest - len(os.fsencode(end))].decode(errors="ignore")
        yield path.with_name(f"{stem}{end}")


def _longest_name(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.pathconf(folder, "PC_NAME_MAX")
    return LONGEST_NAME


def encode(image: Image.Image, kind: str, parameters: str, *, quality: int = QUALITY, name: str = "a picture") -> bytes:
    """The content of a picture's file.

    Args:
        image: in RGB.
        kind: ``PNG``, ``JPEG`` or ``WEBP``.
        parameters: the text of :class:`Parameters`.
        quality: 0..100, of JPEG and WebP.
        name: what warnings call it, where JPEG has no room for all of its settings.
    """
    options: dict[str, Any] = {"format": kind}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        if parameters.isascii():
            info.add_text("parameters", parameters)
        else:
            info.add_itxt("parameters", parameters)
        info.add_itxt("XML:com.adobe.xmp", XMP)
        options["pnginfo"] = info
    else:
        exif = Image.Exif()
        comment = _jpeg_comment(parameters, name) if kind == "JPEG" else parameters.encode("utf-16-be")
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + comment
        options |= {"exif": exif, "quality": quality, "xmp": XMP.encode()}
    encoded = io.BytesIO()  # into a file Pillow's JPEG encoder writes itself, and passes over a disk that is full
    image.save(encoded, **options)
    return encoded.getvalue()


def _jpeg_comment(text: str, name: str) -> bytes:
    """The settings in what room JPEG has: rather a shorter prompt than a picture that is lost."""
    whole = text.encode("utf-16-be")
    if len(whole) <= JPEG_BYTES:
        return whole
    parameters = parse_parameters(text)
    bare = str(dataclasses.replace(parameters, prompt="", negative_prompt="")).encode("utf-16-be")
    room = (JPEG_BYTES - len(bare)) // 4 - 32  # for the label of the negative prompt
    if room < 0:
        logger.warning("%s does not hold its settings: JPEG has no room for so many; PNG and WebP have", name)
        return b""
    prompt, negative = _cut(parameters.prompt, room), _cut(parameters.negative_prompt, room)
    logger.warning("%s holds the first %d characters of the prompt; PNG and WebP hold all", name, len(prompt))
    return dataclasses.replace(parameters, prompt=prompt, negative_prompt=negative).plain().encode("utf-16-be")


def _cut(text: str, units: int) -> str:
    """As much of it as fits so many pairs of bytes."""
    return text.encode("utf-16-be", errors="replace")[: 2 * units].decode("utf-16-be", errors="ignore")
