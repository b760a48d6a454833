"""What an operator tells a running server, with a key of its own: open, close and warm models by name."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from calotype.serving.errors import ConflictError
from calotype.serving.http.drawing import Front
from calotype.serving.http.health import obstacles
from calotype.serving.openai.schema import ErrorAnswer
from calotype.serving.service import Operated

Side = Annotated[int, Field(ge=1, le=1 << 14)]


class Named(BaseModel):
    """A model by the name that the configuration gives it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(max_length=200)]


class Warmed(Named):
    """Sizes that are drawn once, so that the first who asks for one need not wait; width and height in pixels."""

    sizes: Annotated[list[Annotated[list[Side], Field(min_length=2, max_length=2)]], Field(min_length=1, max_length=16)]


class Accepted(BaseModel):
    """It is being done; ``GET /admin/state`` says how far it is."""

    model: str
    ready: bool
    why: str


def router(front: Front) -> APIRouter:
    """``/admin``."""
    found = APIRouter(prefix="/admin", tags=["operator"], responses={409: {"model": ErrorAnswer}})

    def operated() -> Operated:
        if not isinstance(front.service, Operated):
            raise ConflictError("this server's models are fixed; start it again with others")
        return front.service

    def accepted(name: str) -> dict[str, Any]:
        model = front.service.models.get(name)
        return {"model": name, "ready": model is not None and model.ready, "why": "" if model is None else model.why}

    @found.post("/models/load", status_code=202, response_model=Accepted)
    async def load(body: Named) -> Any:
        """Open a model that the configuration names, or open it anew."""
        operated().open_named(body.model)
        return accepted(body.model)

    @found.post("/models/unload", status_code=202, response_model=Accepted)
    async def unload(body: Named) -> Any:
        """Close a model and give its memory back; what waits for it is not drawn."""
        operated().unload(front.model(body.model).name)
        return accepted(body.model)

    @found.post("/models/warm", status_code=202, response_model=Accepted)
    async def warm(body: Warmed) -> Any:
        """Draw sizes of a model once."""
        model = front.model(body.model)
        for width, height in body.sizes:
            front.limits.check_size((width, height), "sizes")
        operated().warm(model.name, [(width, height) for width, height in body.sizes])
        return accepted(model.name)

    @found.get("/state")
    async def state() -> dict[str, Any]:
        """What is known of models, workers and the queue."""
        service = front.service
        models = {
            own.name: {
                "ready": own.ready,
                "why": own.why,
                "digest": own.digest,
                "loras": list(own.loras),
                "controls": list(own.controls),
            }
            for own in service.models.values()
        }
        return {
            "stopping": service.stopping,
            "obstacles": obstacles(service),
            "models": models,
            "load": dataclasses.asdict(service.load),
            "kept": len(front.kept),
            **service.snapshot(),
        }

    return found
