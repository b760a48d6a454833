"""What OpenAI's clients ask for, as they name it, and beside it what only Calotype knows; and the requests it makes.

Fields that OpenAI has and nothing here can do are refused where leaving them out would give another picture, and
ignored where not; a name that neither knows is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from calotype.runtime.adapters.named import NamedLora
from calotype.runtime.arguments import seeds
from calotype.runtime.control import Control
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.canvas import MAX_SIZE
from calotype.runtime.pictures.control_pictures import PREPROCESSORS, RESIZES
from calotype.runtime.request import Request
from calotype.runtime.schedulers import SCHEDULERS
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.controls import MOST_SCALE, control_of
from calotype.serving.http.drawing import Front
from calotype.serving.http.images import Size, decoded
from calotype.serving.service import ModelState

# What OpenAI's clients may send that changes nothing here.
IGNORED = frozenset(
    {
        "moderation",
        "quality",
        "style",
        "user",
        "safety_identifier",
        "complexity",
        "frame_count",
        "frame_duration_ms",
        "svg",
    }
)
SIZE = re.compile("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
FIDELITY = {"high": 0.5, "low": None}  # strength that each asks for, where there is no mask and no strength

Text = Annotated[str, Field(max_length=1 << 20)]


class LoraField(BaseModel):
    """A LoRA by the name that the server lists, and how much of it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    scale: float = 1.0


class ControlField(BaseModel):
    """A ControlNet by the name that the server lists, and the picture that it follows."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=200)]
    image: Annotated[str | None, Field(description="In base64; an edit has its own picture where it is left out.")] = (
        None
    )
    scale: Annotated[float, Field(ge=0, le=MOST_SCALE)] = 1.0
    start: Annotated[float, Field(ge=0, lt=1, description="The share of the steps before it.")] = 0.0
    end: Annotated[float, Field(gt=0, le=1, description="The share of the steps after which it is over.")] = 1.0
    guess: bool = False
    preprocess: Annotated[str | None, Field(max_length=100, description=f"One of {', '.join(PREPROCESSORS)}.")] = None
    mode: Annotated[str | int | None, Field(description="Of a ControlNet that takes several kinds of pictures.")] = None
    resize: Annotated[str, Field(max_length=100, description=f"One of {', '.join(RESIZES)}.")] = "crop"


def _document(schema: dict[str, Any]) -> None:
    """What :meth:`Wanted.check` adds to what pydantic checks."""
    schema["additionalProperties"] = False
    schema["properties"] |= {
        name: {"description": "OpenAI's; taken, and changes nothing here."} for name in sorted(IGNORED)
    }


class Wanted(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, json_schema_extra=_document)

    prompt: Annotated[Text, Field(description="What is to be drawn; an empty text is one.")]
    model: Annotated[str | None, Field(max_length=200, description="A name that GET /v1/models lists.")] = None
    n: Annotated[int | None, Field(ge=1, description="How many pictures.")] = None
    size: Annotated[str | None, Field(pattern=f"^(auto|{SIZE.pattern})$", description="WIDTHxHEIGHT, or auto.")] = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of jpeg and webp; 95 where nothing is said.")
    ] = None
    response_format: Literal["b64_json", "url"] | None = None
    background: Literal["opaque", "auto", "transparent"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    user: Text | None = None
    safety_identifier: Text | None = None

    seed: Annotated[int | None, Field(ge=0, lt=1 << 64, description="Of the first picture; the next has the next.")] = (
        None
    )
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_scale: float | None = None
    guidance_rescale: Annotated[float | None, Field(ge=0, le=1)] = None
    scheduler: Annotated[str | None, Field(max_length=100, description=f"One of {', '.join(SCHEDULERS)}.")] = None
    clip_skip: Annotated[int | None, Field(ge=0)] = None
    loras: list[LoraField] | None = None
    control: list[ControlField] | None = None
    fast: bool | None = None
    deadline: Annotated[float | None, Field(gt=0, description="Seconds, waiting included.")] = None

    @property
    def pictures(self) -> int:
        """How many are asked for."""
        return 1 if self.n is None else self.n

    @property
    def format(self) -> Literal["png", "jpeg", "webp"]:
        """Of the files."""
        return self.output_format or "png"

    @property
    def dimensions(self) -> Size | None:
        """Width and height; None is for the model, or the picture to start from, to say."""
        found = SIZE.fullmatch(self.size or "")
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def quality(self) -> str | None:
        """What was asked for, as answers have it; here it changes nothing."""
        found = (self.model_extra or {}).get("quality")
        return found if isinstance(found, str) and found in ("low", "medium", "high", "xhigh", "max") else None

    def check(self) -> None:
        """Refuse what nothing here does; raises RequestRefusedError."""
        for name in self.model_extra or {}:
            if name not in IGNORED:
                known = sorted({*type(self).model_fields, *IGNORED})
                raise RequestRefusedError(
                    f"there is no field {quoted(name)}; valid: {', '.join(known)}", param=name[:100]
                )
        if self.background == "transparent":
            raise RequestRefusedError("no model here draws transparency; leave background out", param="background")
        if self.format == "png" and self.output_compression not in (None, 100):
            raise RequestRefusedError("output_compression is about jpeg and webp", param="output_compression")
        if self.partial_images and not self.stream:
            raise RequestRefusedError("partial_images come in a stream; give stream=true too", param="partial_images")
        if self.stream and self.response_format == "url":
            raise RequestRefusedError("a stream has pictures, and no URLs", param="response_format")
        if self.dimensions is not None and max(self.dimensions) > MAX_SIZE:
            raise RequestRefusedError(f"size={self.size} has a side of more than {MAX_SIZE} pixels", param="size")

    async def controls(self, front: Front, model: ModelState, size: Size, uploaded: int = 0) -> tuple[Control, ...]:
        """The ControlNets that are asked for, their pictures decoded and fitted to ``size``.

        Args:
            front: of the server.
            model: that draws.
            size: width and height of what is drawn.
            uploaded: pictures that were sent beside those of the controls.

        Raises:
            RequestRefusedError: of the field ``control``.
        """
        asked, found = self.control or [], []
        front.limits.check_uploads(uploaded + sum(own.image is not None for own in asked), "control")
        for own in asked:
            if own.image is None and not uploaded:
                raise RequestRefusedError("a control has no image; send it in base64", param="control")
            image = None
            if own.image is not None:
                image = await front.uploads.picture(decoded(own.image, "control"), "control", front.limits)
            settings = own.model_dump(exclude={"model", "image"})
            found.append(control_of(model, own.model, image, size, field="control", **settings))
        return tuple(found)

    def requests(self, model: ModelState, **more: Any) -> list[Request]:
        """One request for each picture.

        Args:
            model: that draws it.
            more: fields that an endpoint has beside these.

        Raises:
            RequestRefusedError: naming the field.
        """
        width, height = self.dimensions or (None, None)
        self._check_sides(model)
        fields: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": width,
            "height": height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "scheduler": self.scheduler,
            "clip_skip": self.clip_skip,
            "fast": self.fast,
            "loras": self._loras(model),
            **more,
        }
        try:
            return [Request(seed=seed, **fields) for seed in seeds(self.seed, self.pictures)]
        except InputError as error:
            raise RequestRefusedError(error, param=_named(str(error), {"seed", *fields})) from None

    def _check_sides(self, model: ModelState) -> None:
        factor = model.manifest.vae.downscale
        for side in self.dimensions or ():
            if side % factor:
                raise RequestRefusedError(
                    f"size={self.size} is no multiple of {factor} pixels each way; use "
                    + "x".join(str(max(factor, round(own / factor) * factor)) for own in self.dimensions or ()),
                    param="size",
                )

    def _loras(self, model: ModelState) -> tuple[NamedLora, ...] | None:
        """By name: what the service makes of it is no file that a client could name."""
        if self.loras is None:
            return None
        for lora in self.loras:
            if lora.name not in model.loras:
                valid = ", ".join(sorted(model.loras)) or "none"
                raise RequestRefusedError(f"there is no LoRA {quoted(lora.name)}; valid: {valid}", param="loras")
        return tuple(NamedLora(name=lora.name, scale=lora.scale) for lora in self.loras)


class Generation(Wanted):
    """``POST /v1/images/generations``."""


class Edit(Wanted):
    """``POST /v1/images/edits``, without its pictures."""

    input_fidelity: Annotated[
        Literal["high", "low"] | None, Field(description="high is a strength of 0.5 where none is given.")
    ] = None
    strength: Annotated[float | None, Field(ge=0, le=1)] = None
    feather: Annotated[int | None, Field(ge=0)] = None

    def by(self, model: ModelState, references: Sequence[Image.Image], size: Size) -> list[Request]:
        """One request for each picture that goes by ``references``."""
        if self.feather:
            raise RequestRefusedError("feather is about a mask, and there is none", param="feather")
        if self.control:
            raise RequestRefusedError(f"{model.name} goes by pictures itself and takes no controls", param="control")
        sized = self.model_copy(update={"size": f"{size[0]}x{size[1]}"})
        return Wanted.requests(sized, model, references=references)

    def over(
        self, model: ModelState, picture: Image.Image, mask: Image.Image | None, controls: tuple[Control, ...] = ()
    ) -> list[Request]:
        """One request for each picture that is drawn over ``picture``, which is of the size to draw in."""
        strength = self.strength
        if strength is None and mask is None:
            strength = FIDELITY.get(self.input_fidelity or "low")
        feather = self.feather or 0
        if feather and mask is None:
            raise RequestRefusedError("feather is about a mask, and there is none", param="feather")
        sized = self.model_copy(update={"size": f"{picture.width}x{picture.height}"})
        more = {"image": picture, "mask_image": mask, "strength": strength, "feather": feather, "controls": controls}
        return Wanted.requests(sized, model, **more)


def _named(message: str, names: set[str]) -> str | None:
    """The field that a message of the runtime is about: the first one that it names."""
    found = next((word for word in re.findall(r"\w+", message) if word in names), None)
    return {"width": "size", "height": "size", "references": "image"}.get(found or "", found)
