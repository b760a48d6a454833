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
from calotype.serving import admin_api, page
from calotype.serving.errors import ServingError
from calotype.serving.http import health, metrics
from calotype.serving.http.answers import answer
from calotype.serving.http.bodies import Bodies
from calotype.serving.http.drawing import Front
from calotype.serving.http.logs import RequestLog, note
from calotype.serving.http.security import Gate
from calotype.serving.openai import api as openai_api
from calotype.serving.openai.schema import ERRORS
from calotype.serving.webui import api as webui_api
from calotype.serving.webui import controlnet

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
    app.include_router(controlnet.router(front.service))
    app.include_router(page.router(front))
    app.include_router(health.router(front.service))
    app.include_router(metrics.router(front.metrics))
    app.include_router(admin_api.router(front))
    return app


async def _refused(request: Request, error: Any) -> Response:
    note(request.scope, error)
    return answer(error)
