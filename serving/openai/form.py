"""The form of an edit: its fields, its pictures and its mask, read within bounds and never onto a disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from calotype.runtime.errors import quoted
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.drawing import Front
from calotype.serving.openai.fields import ControlField, Edit, LoraField

PICTURE = ("image", "image[]")  # one, or several
MASK = "mask"
FIELDS = 64


# Lists of a form: what one is, and what is said where it is none.
LISTS: Mapping[str, tuple[TypeAdapter[Any], str]] = {
    "loras": (TypeAdapter(list[LoraField]), '[{"name": "style", "scale": 0.8}]'),
    "control": (TypeAdapter(list[ControlField]), '[{"model": "canny", "image": "BASE64", "scale": 0.8}]'),
}
BRACKET = re.compile(rf"({'|'.join(LISTS)})\[\]\[(\w+)\]")  # as OpenAI's client writes lists into forms


class InMemory(MultiPartParser):
    """The body is bounded and in memory already; its parts are kept there, too."""

    spool_max_size = 1 << 40


async def read_edit(front: Front, request: Request) -> tuple[Edit, list[Image.Image], Image.Image | None]:
    """What the form of ``request`` says: its fields, its pictures as RGB, and its mask, white where it draws.

    Raises:
        RequestRefusedError: it is no such form, or a picture cannot be read or is too large.
        RequestValidationError: a field has a wrong value.
    """
    limits, form = front.limits, await _parsed(front, request)
    try:
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        body = edit_of([(name, value) for name, value in form.multi_items() if isinstance(value, str)])
        for name, _ in files:
            if name not in (*PICTURE, MASK):
                line = f"the picture {quoted(name)} has no use here; send image and mask"
                raise RequestRefusedError(line, param=name[:100])
        sent = [file for name, file in files if name in PICTURE]
        if not sent:
            raise RequestRefusedError("there is no picture to edit; send image as a file", param="image")
        limits.check_uploads(len(sent), "image")
        pictures = [await front.uploads.picture(await file.read(), "image", limits) for file in sent]
        masks = [file for name, file in files if name == MASK]
        mask = await front.uploads.mask(await masks[0].read(), MASK, limits) if masks else None
        return body, pictures, mask
    finally:
        await form.close()


def edit_of(items: Sequence[tuple[str, str]]) -> Edit:
    """An edit from the names and texts of a form; lists are JSON, or in brackets as OpenAI's client writes them.

    Raises:
        RequestValidationError: one of them is no such value.
        RequestRefusedError: one is given twice, or a list is none.
    """
    given = [name for name, _ in items if not BRACKET.fullmatch(name)]
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise RequestRefusedError(f"the field {quoted(twice)} is given more than once", param=twice[:100])
    values: dict[str, Any] = {name: text for name, text in items if name in given}
    for name, (kind, example) in LISTS.items():
        try:
            bracketed = _bracketed(name, items)
            if bracketed:
                values[name] = kind.validate_python(bracketed, strict=False)
            elif name in values:
                values[name] = kind.validate_json(values[name])
        except ValueError:  # pydantic's errors are such, too
            raise RequestRefusedError(f"{name} is no such list; give JSON as {example}", param=name) from None
    try:
        return Edit.model_validate(values, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


def _bracketed(name: str, items: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The objects of a list written as ``NAME[][KEY]=…``; raises ValueError where it is not clear whose a key is."""
    columns: dict[str, list[str]] = {}
    for own, text in items:
        found = BRACKET.fullmatch(own)
        if found is not None and found[1] == name:
            columns.setdefault(found[2], []).append(text)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


async def _parsed(front: Front, request: Request) -> FormData:
    parser = InMemory(
        request.headers,
        request.stream(),
        max_files=front.limits.uploads + 2,
        max_fields=FIELDS,
        max_part_size=front.limits.body_bytes,
    )
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        why = error.message if isinstance(error, MultiPartException) else "its boundary is not given"
        raise RequestRefusedError(f"the body is no form that can be read: {why}") from None
