"""AUTOMATIC1111's API, ``/sdapi/v1``, as its clients call it (https://github.com/AUTOMATIC1111/stable-diffusion-webui).

What people's programs ask for is answered as there; what nothing here does is refused by name.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from calotype.runtime.errors import InputError, quoted
from calotype.serving.errors import RequestRefusedError, ServingError
from calotype.serving.http.drawing import Front, unless_gone
from calotype.serving.http.logs import note, record_of
from calotype.serving.service import ModelState
from calotype.serving.webui import controlnet
from calotype.serving.webui.answers import NOT_HERE, NOTHING_THERE, listed, options, png_info, result
from calotype.serving.webui.fields import Drawing, ImageToImage, PngInfo, TextToImage, check
from calotype.serving.webui.jobs import IDLE, Job, Jobs
from calotype.serving.webui.pictures import encoded
from calotype.serving.webui.requests import CHECKPOINT, asked, checkpoint, pictures_of
from calotype.serving.webui.samplers import SAMPLERS, SCHEDULES

PREVIEWS = 8  # of each picture, for whoever asks how far it is


class AsThere(APIRoute):
    """Errors in the form that its clients read: ``detail``, a list where a field is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's own."""
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                note(request.scope, error)
                wrong = [{key: own[key] for key in ("loc", "msg", "type")} for own in error.errors()[:8]]
                return JSONResponse({"detail": wrong}, 422)
            except (RequestRefusedError, InputError) as error:
                note(request.scope, error)
                param = getattr(error, "param", None)
                field = ["body"] if param is None else ["body", param]
                return JSONResponse({"detail": [{"loc": field, "msg": str(error), "type": "value_error"}]}, 422)
            except ServingError as error:
                note(request.scope, error)
                retry = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
                return JSONResponse(_failure(error), error.status, retry)

        return answered


def router(front: Front) -> APIRouter:
    """``/sdapi/v1``."""
    found, jobs = APIRouter(prefix="/sdapi/v1", route_class=AsThere, tags=["AUTOMATIC1111"]), Jobs()
    _draw(found, front, jobs)
    _follow(found, jobs)
    _choose(found, front, jobs)
    _list(found, front)
    for name, value in NOTHING_THERE.items():
        found.add_api_route(f"/{name}", _constant(value), methods=["GET"], name=name)
    for name in NOT_HERE:
        found.add_api_route(f"/{name}", _refusal(name), methods=["GET", "POST"], name=name, include_in_schema=False)
    return found


def _draw(found: APIRouter, front: Front, jobs: Jobs) -> None:
    """Pictures from a prompt, and from pictures."""

    @found.post("/txt2img")
    async def txt2img(request: Request, body: TextToImage) -> dict[str, Any]:
        """Draw pictures from a prompt."""
        return await answered(request, body)

    @found.post("/img2img")
    async def img2img(request: Request, body: ImageToImage) -> dict[str, Any]:
        """Draw over a picture, or over a part of it."""
        return await answered(request, body)

    async def answered(request: Request, body: Drawing) -> dict[str, Any]:
        check(body)
        client = _client(request)
        model = _model(front, jobs, body, client)
        pictures = await asyncio.to_thread(pictures_of, body, model, front.limits)
        drawings = asked(
            lambda: front.submit(request.scope, model, pictures.requests, previews=PREVIEWS, given="batch_size")
        )
        job = Job(client, drawings, body.batch_size or 1)
        jobs.add(job)
        try:
            drawn = await unless_gone(request.receive, job.drawn())
        finally:
            jobs.remove(job)
            job.drop()
        return await asyncio.to_thread(result, body, pictures, model, drawn, job.began)


def _follow(found: APIRouter, jobs: Jobs) -> None:
    """How far a client's pictures are, and their early end."""

    @found.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        job = next(jobs.of(_client(request)), None)
        return IDLE if job is None else await asyncio.to_thread(job.state, None if skip_current_image else encoded)

    @found.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, Any]:
        for job in jobs.of(_client(request)):
            job.interrupt()
        return {}

    @found.post("/skip")
    async def skip(request: Request) -> None:
        for job in jobs.of(_client(request)):
            job.skip()

    @found.post("/png-info")
    async def settings_of(body: PngInfo) -> dict[str, Any]:
        return await asyncio.to_thread(png_info, body.image)


def _choose(found: APIRouter, front: Front, jobs: Jobs) -> None:
    """What a client has chosen: the model that it draws with."""

    @found.get("/options")
    async def get_options(request: Request) -> dict[str, Any]:
        return options(_current(front, jobs, _client(request)))

    @found.post("/options")
    async def set_options(request: Request, changes: dict[str, Any]) -> None:
        client = _client(request)
        own = options(_current(front, jobs, client))
        for name, value in changes.items():
            if name != CHECKPOINT and (name not in own or value != own[name]):
                message = f"{quoted(name)} cannot be set here; valid: {CHECKPOINT}"
                raise RequestRefusedError(message, param=name if name in own else None)
        if CHECKPOINT in changes:
            jobs.models[client] = checkpoint(changes[CHECKPOINT], front.service.models)


def _list(found: APIRouter, front: Front) -> None:
    """What can be asked for, by name."""

    def models() -> Mapping[str, ModelState]:
        return front.service.models

    @found.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        return [listed(model) for model in models().values()]

    @found.post("/refresh-checkpoints")
    async def refresh_checkpoints() -> None:
        """Nothing: what is served is known at every moment."""

    @found.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        names = dict.fromkeys(name for model in models().values() for name in model.loras)
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]

    @found.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """By the extension's own name its clients see that it is there; units of a request before stay, else."""
        there = [controlnet.LISTED] if any(model.controls for model in models().values()) else []
        return {"txt2img": there, "img2img": there}

    @found.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": name, "aliases": [own], "options": {}} for name, (own, _) in SAMPLERS.items()]

    @found.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        fields = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{"name": name, "label": label, **fields} for name, (label, _) in SCHEDULES.items()]


def _model(front: Front, jobs: Jobs, body: Drawing, client: str) -> ModelState:
    """What a request is drawn with: the model that it names, or the one that its client has chosen."""
    chosen = (body.override_settings or {}).get(CHECKPOINT)
    if chosen is not None:
        return front.service.models[checkpoint(chosen, front.service.models)]
    return _current(front, jobs, client)


def _current(front: Front, jobs: Jobs, client: str) -> ModelState:
    chosen = jobs.models.get(client)
    return front.model(chosen if chosen in front.service.models else None)


def _client(request: Request) -> str:
    """The name of the key that asks; "" where none is needed."""
    return record_of(request.scope).client


def _failure(error: ServingError) -> dict[str, Any]:
    """As its web interface says what went wrong."""
    return {"error": type(error).__name__, "detail": str(error), "body": "", "errors": str(error)}


def _constant(value: Any) -> Callable[[], Any]:
    async def answer() -> Any:
        return value

    return answer


def _refusal(name: str) -> Callable[[], Response]:
    def answer() -> Response:
        return JSONResponse({"detail": f"{name} is not supported here"}, 404)

    return answer
