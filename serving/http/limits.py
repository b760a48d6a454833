"""What a stranger may ask for: bounds that are checked before memory or time is spent."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import InputError
from calotype.runtime.request import Request
from calotype.serving.errors import RequestRefusedError

# Bounds that may be zero, or None for none of it.
FROM_ZERO = ("loras", "controls", "kept_seconds", "kept_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of one request, where nothing else is said.

    Attributes:
        body_bytes: of a request's body.
        bodies_bytes: of the bodies of all requests that are being read.
        body_seconds: that a body may take to arrive.
        header_seconds: that the lines before it may take.
        stalled_seconds: that a client may take nothing of its answer.
        keep_alive_seconds: after which a stream that waits says that it is still there.
        uploads: pictures in a request.
        upload_pixels: of each of them.
        output_pixels: of a picture that is drawn.
        images: pictures of one request that are drawn.
        steps: of a picture.
        prompt_characters: of the prompt, and of the negative prompt.
        loras: of a picture.
        controls: of a picture.
        deadline_seconds: that a picture may take, waiting included; also what a request has that names no deadline.
        kept_seconds: that a picture is kept for its URL; 0 keeps none, and there are no URLs.
        kept_bytes: of all pictures that are kept.

    Raises:
        InputError: one is no number, or below 1 (0 for what may be none).
    """

    body_bytes: int = 64 << 20
    bodies_bytes: int = 512 << 20
    body_seconds: float = 60.0
    header_seconds: float = 10.0
    stalled_seconds: float = 60.0
    keep_alive_seconds: float = 15.0
    uploads: int = 4
    upload_pixels: int = 1 << 25
    output_pixels: int = 1 << 22
    images: int = 10
    steps: int = 150
    prompt_characters: int = 4000
    loras: int = 8
    controls: int = 4
    deadline_seconds: float = 600.0
    kept_seconds: float = 0.0
    kept_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            low = 0 if field.name in FROM_ZERO else 1 if whole else 0.001
            sound = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not sound or not low <= value < math.inf:
                kind = "a whole number" if whole else "a number"
                raise InputError(f"the limit {field.name}={value!r} is not {kind} from {low:g} on")

    def check(self, request: Request, manifest: Manifest) -> None:
        """Refuse a request that asks for too much of a model; sizes that it leaves open are the model's own.

        A request that starts from a picture is to name its size.

        Raises:
            RequestRefusedError: naming the field.
        """
        for name in ("prompt", "negative_prompt"):
            self._check(name, len(getattr(request, name)), self.prompt_characters, "characters")
        listed = request.timesteps or request.sigmas
        steps = len(listed) if listed else request.num_inference_steps
        if steps is not None:  # the model's own number is its operator's choice
            self._check("num_inference_steps", steps, self.steps, "steps")
        width = manifest.defaults.width if request.width is None else request.width
        height = manifest.defaults.height if request.height is None else request.height
        self.check_size((width, height), "size")
        self._check("loras", len(request.loras or ()), self.loras, "LoRAs")
        self._check("control", len(request.controls), self.controls, "ControlNets")

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Refuse a picture of that size in pixels, which is to be drawn; raises RequestRefusedError."""
        self._check(name, size[0] * size[1], self.output_pixels, f"pixels ({size[0]}x{size[1]})")

    def check_images(self, count: int, name: str = "n") -> None:
        """Refuse more pictures in one request than it may have drawn; raises RequestRefusedError."""
        self._check(name, count, self.images, "pictures")

    def check_upload(self, size: tuple[int, int], name: str) -> None:
        """Refuse a picture of that size in pixels, which is not decoded yet; raises RequestRefusedError."""
        self._check(name, size[0] * size[1], self.upload_pixels, f"pixels ({size[0]}x{size[1]})")

    def check_uploads(self, count: int, name: str) -> None:
        """Refuse more pictures in one request than it may send; raises RequestRefusedError."""
        self._check(name, count, self.uploads, "pictures")

    def seconds(self, deadline: float | None) -> float:
        """How long a picture may take, of what a client asked for; raises RequestRefusedError."""
        if deadline is None:
            return self.deadline_seconds
        self._check("deadline", deadline, self.deadline_seconds, "seconds")
        return deadline

    @staticmethod
    def _check(name: str, value: Any, most: float, what: str) -> None:
        if value > most:
            shown, bound = (f"{own:.15g}" for own in (value, most))
            raise RequestRefusedError(f"{name} is {shown} {what}, and this server takes at most {bound}", param=name)
