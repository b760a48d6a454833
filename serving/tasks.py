"""A task: one picture that a client waits for, and what happens to it on its way."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.request import Request

Pixels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One picture, as the HTTP side hands it over; a request of ``n`` pictures is ``n`` tasks.

    Attributes:
        id: names it in every process and log line; the request's id, and behind it the picture's number.
        model: the name under which the model is served.
        request: checked, its seed chosen, its pictures decoded. No path in it comes from a client.
        deadline: in seconds of ``time.monotonic()``, which all processes of a machine share; None is none.
        priority: what the client's key has; 1.0 is the usual one, and 2.0 waits half as long.
        previews: how many pictures of what there is so far are wanted, spread over the steps.
        client: the name of the key that asked; "" where none is needed.
    """

    id: str
    model: str
    request: Request
    deadline: float | None = None
    priority: float = 1.0
    previews: int = 0
    client: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """Its first run has begun; a task that is drawn again after a worker's death starts again."""

    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepped:
    """``step`` of ``steps`` are done; ``preview`` is what there is so far, (h, w, 3), where one was due."""

    step: int
    steps: int
    preview: Pixels | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The picture: the last event.

    Attributes:
        pixels: (H, W, 3), RGB.
        parameters: the text that its file carries; ``calotype generate --again`` reads it.
        request: with every default filled in, as JSON has it, without pictures.
        seconds: by stage: ``queue``, ``encode``, ``denoise``, ``decode``, ``total``.
        tokens: of the prompt, for clients that count them.
    """

    pixels: Pixels
    parameters: str
    request: dict[str, Any]
    seconds: dict[str, float]
    tokens: int = 0


Event = Started | Stepped | Drawn
