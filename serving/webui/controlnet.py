"""The ControlNet extension's part of AUTOMATIC1111's API (https://github.com/Mikubill/sd-webui-controlnet).

Its units come in ``alwayson_scripts``; what there is to choose from is listed below ``/controlnet``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, ValidationError

from calotype.runtime.control import Control
from calotype.runtime.errors import quoted
from calotype.runtime.pictures.control_pictures import PREPROCESSORS
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.controls import control_of
from calotype.serving.http.images import Size
from calotype.serving.http.limits import Limits
from calotype.serving.service import ModelState, Service
from calotype.serving.webui.pictures import opened

FIELD = "alwayson_scripts"
SCRIPT = "controlnet"  # in any case
LISTED = "controlnet m2m"  # what the extension adds to the list of scripts
VERSION = 3
NONE = "none"
# Its names of ways to fit a picture, of every version, and ours; a picture with black around it has no stretched edges.
RESIZED: Mapping[str | int, str] = {
    **dict.fromkeys((0, "Just Resize"), "stretch"),
    **dict.fromkeys((1, "Crop and Resize", "Inner Fit (Scale to Fit)", "Scale to Fit (Inner Fit)"), "crop"),
    **dict.fromkeys((2, "Resize and Fill", "Envelope (Outer Fit)"), "pad"),
}
# Its names of who wins, and whether the ControlNet acts on the row with the prompt alone.
GUESSED: Mapping[str | int, bool] = {
    **dict.fromkeys((0, "Balanced"), False),
    **dict.fromkeys((2, "ControlNet is more important"), True),
}


class Unit(BaseModel):
    """One of its units; what is about its preprocessors alone says nothing here."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    enabled: bool = True
    image: str | Mapping[str, Any] | None = None
    input_image: str | None = None  # its older name
    mask: str | None = None
    module: str | None = NONE
    model: str | None = None
    weight: float = 1.0
    resize_mode: str | int = 1
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: str | int = 0
    low_vram: bool | None = None
    processor_res: float | None = None
    threshold_a: float | None = None
    threshold_b: float | None = None
    pixel_perfect: bool | None = None
    hr_option: str | int | None = None


def units_of(scripts: Mapping[str, Any] | None) -> list[Unit]:
    """The units that are on, of ``alwayson_scripts``; raises RequestRefusedError."""
    found = []
    for name, value in (scripts or {}).items():
        if name.lower() != SCRIPT:
            continue
        listed = value.get("args", []) if isinstance(value, Mapping) else None
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise RequestRefusedError(f"{name} has no list args of units", param=FIELD)
        try:
            found += [Unit.model_validate(own) for own in listed if own is not False]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise RequestRefusedError(f"a unit of {name} is wrong: {where}: {first['msg']}", param=FIELD) from None
    return [unit for unit in found if unit.enabled and (unit.model or "None") != "None"]


def controls_of(
    units: Sequence[Unit], model: ModelState, size: Size, limits: Limits, *, pictured: bool
) -> tuple[Control, ...]:
    """What the units ask for. It decodes pictures, so it belongs in a thread.

    Args:
        units: those that are on.
        model: what draws.
        size: width and height of what is drawn.
        limits: the server's.
        pictured: whether there is a picture to start from, which a unit without its own takes.

    Raises:
        RequestRefusedError: a unit asks for what nothing here does.
    """
    limits.check_uploads(len(units) + pictured, FIELD)
    return tuple(_control(unit, model, size, limits, pictured) for unit in units)


def router(service: Service) -> APIRouter:
    """``/controlnet``: what there is to choose from."""
    found = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])

    @found.get("/version")
    async def version() -> dict[str, int]:
        return {"version": VERSION}

    @found.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        return {"model_list": list(dict.fromkeys(name for own in service.models.values() for name in own.controls))}

    @found.get("/module_list")
    async def module_list() -> dict[str, Any]:
        names = [NONE, *PREPROCESSORS]
        return {"module_list": names, "module_detail": {name: {"model_free": False, "sliders": []} for name in names}}

    return found


def _control(unit: Unit, model: ModelState, size: Size, limits: Limits, pictured: bool) -> Control:
    module = (unit.module or NONE).lower()
    if module != NONE and module not in PREPROCESSORS:
        valid = ", ".join([NONE, *PREPROCESSORS])
        raise RequestRefusedError(f"there is no preprocessor {quoted(unit.module)} here; valid: {valid}", param=FIELD)
    if unit.mask or (isinstance(unit.image, Mapping) and unit.image.get("mask")):
        raise RequestRefusedError("a unit's mask is not supported here; leave it out", param=FIELD)
    text = unit.image.get("image") if isinstance(unit.image, Mapping) else unit.image
    text = text or unit.input_image
    if not text and not pictured:
        raise RequestRefusedError("a unit of ControlNet has no image", param=FIELD)
    return control_of(
        model,
        str(unit.model).partition(" [")[0],  # its own names have a hash behind them
        opened(str(text), FIELD, limits) if text else None,
        size,
        field=FIELD,
        scale=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        guess=_chosen("control_mode", unit.control_mode, GUESSED),
        preprocess=None if module == NONE else _preprocess(module, unit),
        resize=_chosen("resize_mode", unit.resize_mode, RESIZED),
    )


def _preprocess(module: str, unit: Unit) -> str:
    """The preprocessor with the unit's thresholds; below zero they are its own."""
    levels = (unit.threshold_a, unit.threshold_b)[: len(PREPROCESSORS[module].levels)]
    known = [int(level) for level in levels if level is not None and level >= 0]
    return "-".join([module, *map(str, known)]) if len(known) == len(levels) else module


def _chosen(name: str, value: str | int, known: Mapping[str | int, Any]) -> Any:
    if value not in known:
        valid = ", ".join(own for own in known if isinstance(own, str))
        raise RequestRefusedError(f"{name}={quoted(value)} is not supported here; valid: {valid}", param=FIELD)
    return known[value]
