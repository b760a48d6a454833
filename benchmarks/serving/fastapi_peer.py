"""A plain FastAPI server over a locked pipeline of diffusers, as many services begin.

python fastapi_peer.py CHECKPOINT SIZE PORT
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import fastapi
import uvicorn
from drawing import draw, load

checkpoint, size, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipeline, lock, app = load(checkpoint), threading.Lock(), fastapi.FastAPI()


@app.post("/v1/images/generations")
def generate(body: dict[str, Any]) -> dict[str, Any]:
    """A picture; FastAPI calls it in a thread of its pool."""
    with lock:
        return draw(pipeline, [body], size)[0]


@app.get("/readyz")
def ready() -> str:
    """The pipeline is open."""
    return "ok"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
