"""ControlNets of a request: by the names that the server lists, with pictures that were sent."""

from __future__ import annotations

from typing import Any

from PIL import Image

from calotype.runtime.control import Control
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.control_pictures import RESIZES
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.images import Size
from calotype.serving.service import ModelState

MOST_SCALE = 10.0  # above it a picture is none


def control_of(
    model: ModelState, name: str, image: Image.Image | None, size: Size, *, field: str, **settings: Any
) -> Control:
    """One ControlNet's part in a request.

    Args:
        model: that draws; it lists the names.
        name: of the ControlNet.
        image: its picture; None is the one to start from.
        size: that is drawn; the picture is fitted to it here, so that what is left over is not kept while it waits.
        field: that says so, for messages.
        settings: other fields of a :class:`Control`.

    Raises:
        RequestRefusedError: there is none of that name, or a setting is out of range.
    """
    if name not in model.controls:
        valid = ", ".join(model.controls) or "none"
        raise RequestRefusedError(f"there is no control {quoted(name)}; valid: {valid}", param=field)
    try:
        found = Control(model=name, image=image, **settings)
    except InputError as error:
        raise RequestRefusedError(error, param=field) from None
    if not 0 <= found.scale <= MOST_SCALE:
        raise RequestRefusedError(
            f"a control's scale={found.scale:g} is out of range; give 0 to {MOST_SCALE:g}", param=field
        )
    if image is None:
        return found
    return Control(model=name, image=RESIZES[found.resize](image, *size), **settings)
