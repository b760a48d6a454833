"""What a peer's process and the harness say to each other: JSON, one line each way, on the process's own pipe.

The harness sends ``{"load": {"model": …, "mode": …}}``, then any number of ``{"generate": {…}}`` with the fields of
:class:`Task`; each is answered by one object. The end of the input ends the process. What libraries print goes to
stderr. This file and the peers' own run in environments without Calotype, on the standard library and NumPy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One call: ``images`` pictures of one prompt.

    ``latents`` is an ``.npy`` file, (images, C, h, w) float32 of unit variance; ``output`` the file for the pictures,
    (images, H, W, 3) uint8.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    images: int
    seed: int
    latents: str
    output: str


@dataclasses.dataclass(kw_only=True)
class Made:
    """Pictures, and seconds: of each denoising step, and of the stages that the peer tells apart."""

    pictures: Array
    steps: list[float]
    stages: dict[str, float] = dataclasses.field(default_factory=dict)


class Server(Protocol):
    """A peer with its model loaded."""

    def generate(self, task: Task, latents: Array) -> Made:
        """Draw."""


def serve(load: Callable[[str, str], Server], imports: Callable[[], Mapping[str, str]]) -> None:
    """Answer until the input ends.

    Args:
        load: opens a model's folder in a mode.
        imports: imports the peer's library, and says the versions that matter.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not get in between
    server: Server | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                begin = time.perf_counter()
                versions = imports()
                imported = time.perf_counter()
                server = load(**request["load"])
                end = time.perf_counter()
                answer = {"import": imported - begin, "load": end - imported, "versions": dict(versions)}
            else:
                assert server is not None
                answer = _generate(server, Task(**request["generate"]))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _generate(server: Server, task: Task) -> dict[str, Any]:
    latents = np.load(task.latents)
    begin = time.perf_counter()
    made = server.generate(task, latents)
    seconds = time.perf_counter() - begin
    assert made.pictures.dtype == np.uint8
    assert made.pictures.shape == (task.images, task.height, task.width, 3), made.pictures.shape
    np.save(task.output, made.pictures)
    return {"seconds": seconds, "steps": made.steps, "stages": made.stages}
