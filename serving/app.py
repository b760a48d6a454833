"""The application: every API over one service, behind the same layers, with its errors made in one place."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from calotype.runtime.errors import InputError
from calotype.runtime.version import __version__
from calotype.serving import admin_api, health, metrics, openai_api, page, webui_api
from calotype.serving.answers import answer
from calotype.serving.bodies import Bodies
from calotype.serving.drawing import Front
from calotype.serving.errors import ServingError
from calotype.serving.logs import RequestLog, note
from calotype.serving.openai_schema import ERRORS
from calotype.serving.security import Gate

EXPECTED: tuple[type[Exception], ...] = (ServingError, InputError, RequestValidationError, HTTPException)


def create_app(front: Front) -> FastAPI:
    """The application that serves what ``front`` draws; its settings may be changed while it runs."""
    layers = [
        Middleware(RequestLog, count=front.metrics.responses),
        Middleware(Gate, access=lambda: front.settings.access),
        Middleware(Bodies, limits=lambda: front.settings.limits),
    ]
    app = FastAPI(
        title="Calotype",
        version=__version__,
        middleware=layers,
        exception_handlers=dict.fromkeys(EXPECTED, _refused),
        responses=ERRORS,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.front = front
    app.include_router(openai_api.router(front))
    app.include_router(webui_api.router(front))
    app.include_router(page.router(front))
    app.include_router(health.router(front.service))
    app.include_router(metrics.router(front.metrics))
    app.include_router(admin_api.router(front))
    return app


async def _refused(request: Request, error: Any) -> Response:
    note(request.scope, error)
    return answer(error)
