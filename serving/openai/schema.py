"""What the OpenAPI document says of OpenAI's endpoints beside what FastAPI reads from their code."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from calotype.serving.openai.fields import Edit


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` is the field, ``code`` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


class ModelAnswer(BaseModel):
    """A model; ``size`` is what ``auto`` is for it, ``loras`` and ``controls`` the names that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    ready: bool
    size: str
    loras: list[str]
    controls: list[str]


class ModelsAnswer(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class InputDetails(BaseModel):
    """Tokens of what was sent."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens: of the prompt, and one for each 16x16 pixels of a picture."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: InputDetails
    total_tokens: int


class PictureAnswer(BaseModel):
    """A picture, as base64 or by its URL, and the seed that makes it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class PicturesAnswer(BaseModel):
    """The pictures of a request."""

    created: int
    background: Literal["opaque"]
    data: list[PictureAnswer]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    usage: Usage
    quality: str | None = None
    safety_identifier: str | None = None


STATUSES = {
    400: "The request cannot be drawn as it is; param names the field.",
    401: "A key is needed.",
    403: "It comes from a page of another site, or under another name.",
    404: "There is no such model.",
    405: "Not by this method.",
    408: "The body did not arrive in time.",
    409: "It does not fit what is going on.",
    413: "The body is too large.",
    415: "The body is of another kind.",
    429: "So much is waiting, or the key has asked for so much, that this would have to wait too long.",
    500: "Something went wrong inside the server.",
    503: "The model is not open, or there is no memory for this.",
    504: "The deadline cannot be met, or has passed.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in STATUSES.items()
}
# Where stream is true, the answer is events.
PICTURES: dict[int | str, dict[str, Any]] = {200: {"model": PicturesAnswer, "content": {"text/event-stream": {}}}}


def _edit_body() -> dict[str, Any]:
    """The form of an edit: its fields, and its pictures as files."""
    schema = Edit.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    for field in schema["properties"].values():  # a form has no null
        if "anyOf" in field:
            field |= next(own for own in field.pop("anyOf") if own != {"type": "null"})
            field.pop("default", None)
    schema["properties"]["loras"] = {
        "type": "string",
        "description": 'JSON, such as [{"name": "style", "scale": 0.8}].',
    }
    schema["properties"]["control"] = {
        "type": "string",
        "description": 'JSON, such as [{"model": "canny", "image": "BASE64", "scale": 0.8}].',
    }
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {
        "image": {**file, "description": "The picture; several are image[]."},
        "image[]": {"type": "array", "items": file},
        "mask": {**file, "description": "Of the first picture's size; what is transparent is drawn."},
    }
    schema["required"] = ["prompt", "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


EDIT_BODY = _edit_body()
