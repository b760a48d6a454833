"""Whether the server lives, and whether it can draw: two questions, for what restarts it and for what sends it work."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from calotype.serving.http.answers import Answer
from calotype.serving.service import Service


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class Readiness(BaseModel):
    """Whether every model is open and warm; ``why`` says of each that is not what keeps it, and of "" the server."""

    status: Literal["ready", "not ready"]
    why: dict[str, str]


def obstacles(service: Service) -> dict[str, str]:
    """What keeps the server from drawing, by model; "" is what keeps all of it."""
    if service.stopping:
        return {"": "the server is stopping"}
    if not service.models:
        return {"": "no model is open"}
    return {own.name: own.why or "it is being opened" for own in service.models.values() if not own.ready}


def router(service: Service) -> APIRouter:
    """``/livez`` and ``/readyz``."""
    found = APIRouter(tags=["operation"])

    @found.get("/livez", response_model=Alive)
    async def livez() -> Any:
        """Whether the process answers; what fails here is to be started anew."""
        return {"status": "alive"}

    @found.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> Any:
        """Whether all models are open and warm, and the server is not stopping; what fails here gets no work."""
        why = obstacles(service)
        value = {"status": "not ready" if why else "ready", "why": why}
        return Answer(value, status_code=503 if why else 200)

    return found
