"""The form of an edit: its fields, its pictures and its mask, read within bounds and never onto a disk."""

from __future__ import annotations

from fastapi import Request
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from calotype.runtime.errors import quoted
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.drawing import Front
from calotype.serving.openai.fields import Edit

PICTURE = ("image", "image[]")  # one, or several
MASK = "mask"
FIELDS = 64
FIELD_BYTES = 1 << 20


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
        body = Edit.of_form([(name, value) for name, value in form.multi_items() if isinstance(value, str)])
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


async def _parsed(front: Front, request: Request) -> FormData:
    parser = InMemory(
        request.headers,
        request.stream(),
        max_files=front.limits.uploads + 2,
        max_fields=FIELDS,
        max_part_size=FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        why = error.message if isinstance(error, MultiPartException) else "its boundary is not given"
        raise RequestRefusedError(f"the body is no form that can be read: {why}") from None
