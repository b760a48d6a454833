"""OpenAI's Images, as its own clients call them: https://platform.openai.com/docs/api-reference/images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from calotype.runtime.families import family_of
from calotype.runtime.request import Request as Drawable
from calotype.serving.errors import RequestRefusedError, UnknownModelError
from calotype.serving.http.drawing import Drawing, Front
from calotype.serving.http.images import automatic, tokens
from calotype.serving.http.kept import MEDIA
from calotype.serving.openai.answers import answered
from calotype.serving.openai.fields import Generation, Wanted
from calotype.serving.openai.form import read_edit
from calotype.serving.openai.schema import EDIT_BODY, PICTURES, ErrorAnswer, ModelAnswer, ModelsAnswer
from calotype.serving.service import ModelState


def router(front: Front) -> APIRouter:
    """``/v1``: generations, edits, models, and pictures that are kept."""
    found = APIRouter(prefix="/v1", tags=["OpenAI"])

    @found.post("/images/generations", responses=PICTURES)
    async def generate(request: Request, body: Generation) -> Response:
        """Draw pictures from a prompt."""
        body.check()
        front.limits.check_images(body.pictures)
        model = front.model(body.model)
        size = body.dimensions or (model.manifest.defaults.width, model.manifest.defaults.height)
        controls = await body.controls(front, model, size)
        drawings = _submit(front, request, model, body, body.requests(model, controls=controls))
        return await answered(front, request, body, drawings, "image_generation")

    @found.post("/images/edits", responses=PICTURES, openapi_extra=EDIT_BODY)
    async def edit(request: Request) -> Response:
        """Draw over a picture, or over the part of it where its mask is transparent.

        Of several pictures each is drawn over by itself, ``n`` times, in their order; the mask is the first one's.
        A model that edits goes by all of them at once instead, where there is neither a mask nor a strength.
        """
        return await _edited(front, request)

    @found.get("/models", response_model=ModelsAnswer)
    async def models() -> Any:
        """What draws here; the first one does where a request names none."""
        return {"object": "list", "data": [_model(model) for model in front.service.models.values()]}

    @found.get("/models/{model:path}", response_model=ModelAnswer, responses={404: {"model": ErrorAnswer}})
    async def one_model(model: str) -> Any:
        """One of them."""
        return _model(front.model(model))

    @found.get(
        "/images/kept/{name}",
        response_class=Response,
        responses={
            200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA.values()}},
            404: {"model": ErrorAnswer},
        },
    )
    async def kept(name: str, expires: int, signature: str) -> Response:
        """A picture by the URL that an answer had."""
        file = front.kept.find(name, expires, signature)
        if file is None:
            raise NotKeptError("there is no such picture; it is kept for a while only, for who has its whole URL")
        return Response(file.data, media_type=MEDIA[file.kind], headers={"Cache-Control": "private, max-age=60"})

    return found


class NotKeptError(UnknownModelError):
    """There is no such picture, or no longer."""

    code = "not_found"


async def _edited(front: Front, request: Request) -> Response:
    body, pictures, mask = await read_edit(front, request)
    body.check()
    model = front.model(body.model)
    if _edits(model) and mask is None and body.strength is None:
        front.limits.check_images(body.pictures)
        size = body.dimensions or automatic(pictures[0].size, model.manifest)
        shown = await front.uploads.shown(pictures, model.manifest.vae.downscale)
        drawings = _submit(front, request, model, body, body.by(model, shown, size))
        return await answered(front, request, body, drawings, "image_edit", sum(tokens(own.size) for own in shown))
    front.limits.check_images(body.pictures * len(pictures))
    requests: list[Drawable] = []
    for number, picture in enumerate(pictures):
        size = body.dimensions or automatic(picture.size, model.manifest)
        over = await front.uploads.fitted(picture, mask if number == 0 else None, size)
        controls = await body.controls(front, model, size, len(pictures))
        requests += body.over(model, over[0], over[1] if len(over) > 1 else None, controls)
    drawings = _submit(front, request, model, body, requests)
    return await answered(front, request, body, drawings, "image_edit", sum(tokens(own.size) for own in pictures))


def _submit(
    front: Front, request: Request, model: ModelState, body: Wanted, requests: Sequence[Drawable]
) -> list[Drawing]:
    if body.response_format == "url" and not front.limits.kept_seconds:
        raise RequestRefusedError("this server keeps no pictures; ask for b64_json", param="response_format")
    previews = (body.partial_images or 0) if body.stream else 0
    return front.submit(request.scope, model, requests, previews=previews, deadline=body.deadline)


def _edits(model: ModelState) -> bool:
    """Whether it goes by reference pictures."""
    return family_of(model.manifest.family).editor in model.manifest.networks


def _model(model: ModelState) -> dict[str, Any]:
    defaults = model.manifest.defaults
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "calotype",
        "ready": model.ready,
        "size": f"{defaults.width}x{defaults.height}",
        "loras": list(model.loras),
        "controls": list(model.controls),
    }
