"""The page for people: its files, what it needs to know of the server, and the settings in a picture."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.embedded import Graph, settings_in
from calotype.runtime.pictures.parameters import parse_parameters
from calotype.runtime.schedulers import SCHEDULERS
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.drawing import Front
from calotype.serving.http.images import decoded
from calotype.serving.service import ModelState
from calotype.serving.webui.samplers import sampling

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS: Mapping[str, str] = {
    # Nothing comes from anywhere else, and no page of others may show this one.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept, and asked after each time: a new version shows at once.
    "Cache-Control": "no-cache",
}
# Names and proportions of the sizes that are offered beside the model's own.
SHAPES = (("Portrait", 3, 4), ("Landscape", 4, 3))


class Carrier(BaseModel):
    """A picture file, in base64."""

    image: str


def router(front: Front) -> APIRouter:
    """The page at ``/`` and its files, which need no key; ``/ui/settings`` and ``/ui/read``, which do."""
    found = APIRouter(include_in_schema=False)
    for path in sorted(FOLDER.iterdir()):
        where = "/" if path.name == "index.html" else f"/page/{path.name}"
        found.add_api_route(where, _file(path), methods=["GET", "HEAD"])

    @found.get("/ui/settings")
    async def settings() -> dict[str, Any]:
        limits = front.limits
        return {
            "models": [offered(model) for model in front.service.models.values()],
            "schedulers": sorted(SCHEDULERS),
            "bounds": {"pictures": limits.images, "steps": limits.steps, "pixels": limits.output_pixels},
        }

    @found.post("/ui/read")
    async def read(carrier: Carrier) -> dict[str, Any]:
        return {"settings": await asyncio.to_thread(carried, carrier.image)}

    return found


def offered(model: ModelState) -> dict[str, Any]:
    """What the page offers of a model."""
    defaults, factor = model.manifest.defaults, model.manifest.vae.downscale
    width, height = defaults.width, defaults.height
    stride = max(factor, min(width, height) // 8 // factor * factor)
    sizes = [{"label": "The model’s own", "width": width, "height": height}]
    for label, across, down in SHAPES:
        sides = (math.sqrt(width * height * share) for share in (across / down, down / across))
        own_width, own_height = (max(stride, round(side / stride) * stride) for side in sides)
        sizes.append({"label": label, "width": own_width, "height": own_height})
    return {
        "name": model.name,
        "ready": model.ready,
        "why": model.why,
        "sizes": sizes,
        "downscale": factor,
        "steps": defaults.num_inference_steps,
        "guidance": defaults.guidance_scale,
        "loras": list(model.loras),
    }


def carried(image: str) -> dict[str, Any] | None:
    """The settings in a picture file in base64, as the page's fields; None where it has none that are known.

    Raises:
        RequestRefusedError: it is no base64.
    """
    try:
        text = settings_in(decoded(image, "image"), "the picture")
    except InputError:
        return None
    if isinstance(text, Graph):
        return None
    found = parse_parameters(text)
    try:
        scheduler = None if found.sampler is None else sampling(found.sampler, None, "")[0]
    except RequestRefusedError:
        scheduler = None
    fields = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "width", "height", "model")
    return {**{name: getattr(found, name) for name in fields}, "scheduler": scheduler}


def _file(path: Path) -> Callable[[Request], Response]:
    """Answers with a file, or that it is still the same."""
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    kind = f"{TYPES[path.suffix]}; charset=utf-8"

    def answer(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
