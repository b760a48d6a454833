"""What a worker has: open models, and tasks on their way, with what is said of them in the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Self

import numpy as np

from calotype.runtime.errors import BackendError, CalotypeError, InputError
from calotype.runtime.families import family_of
from calotype.runtime.loras import merged_into
from calotype.runtime.picture import Picture
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.preparation import Drawing
from calotype.runtime.text.prompts import parse_prompt
from calotype.runtime.text.tokenizer import ClipTokenizer
from calotype.serving.errors import DrawingError, FilteredError, OutOfMemoryError, RequestRefusedError, ServingError
from calotype.serving.tasks import Drawn
from calotype.serving.wording import said
from calotype.serving.workers.filters import UNSAFE, Filter, filtered
from calotype.serving.workers.messages import Submit
from calotype.serving.workers.previews import PreviewMap

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True, eq=False)
class Model:
    """An open model, and the number of the order that opened it."""

    name: str
    number: int
    pipeline: Pipeline
    tokenizer: ClipTokenizer
    controls: tuple[str, ...] = ()  # names of its ControlNets
    filter: Filter | None = None
    hidden: bool = False  # whether nothing is shown before it is checked
    previews: PreviewMap = dataclasses.field(default_factory=PreviewMap)
    used: bool = False  # since its memory was trimmed

    @classmethod
    def of(cls, name: str, number: int, pipeline: Pipeline) -> Self:
        """The model that ``pipeline`` has open; prompts are counted with its first tokenizer."""
        bundle = pipeline.networks.bundle
        spec = bundle.manifest.tokenizers[family_of(bundle.manifest.family).encoders[0].tokenizer]
        tokenizer = ClipTokenizer.from_files(bundle.path / spec.vocab, bundle.path / spec.merges, spec)
        return cls(name=name, number=number, pipeline=pipeline, tokenizer=tokenizer)

    def tokens(self, prompt: str) -> int:
        """Of a prompt, without those that begin, end and fill it up."""
        return sum(len(word) for text, _ in parse_prompt(prompt) for word in self.tokenizer.words(text))


@dataclasses.dataclass(kw_only=True, eq=False)
class Work:
    """A task on its way, and the times (``time.monotonic()``) of its stages."""

    order: Submit
    model: Model
    job: Drawing | None = None
    due: frozenset[int] = frozenset()  # steps after which a preview is wanted
    begun: float = 0.0
    encoded: float = 0.0
    first_run: float = 0.0
    last_run: float = 0.0

    @property
    def id(self) -> str:
        return self.order.task.id


def spread(previews: int, steps: int) -> frozenset[int]:
    """After which of ``steps`` so many previews are shown."""
    return frozenset(round(steps * number / (previews + 1)) for number in range(1, previews + 1))


def drawn_of(work: Work, picture: Picture, decoding: float) -> Drawn:
    """What is shown of a finished picture.

    Raises:
        FilteredError: it is not to be shown.
        DrawingError: the output filter failed.
    """
    accepted, request = work.order.accepted, picture.settings.request
    plain = dataclasses.replace(request, image=None, mask_image=None, strength=None, feather=0, loras=None, controls=())
    known = plain.to_json()
    if request.image is not None:
        known |= {"strength": request.strength, "feather": request.feather}
    if request.loras:
        known["loras"] = [{"name": lora.path.stem, "scale": lora.scale} for lora in merged_into(request)]
    if request.controls:
        names = ("model", "scale", "start", "end")
        known["control"] = [{name: getattr(own, name) for name in names} for own in request.controls]
    if picture.flagged:
        raise FilteredError(UNSAFE)
    pixels = np.asarray(picture.image)
    if work.model.filter is not None:
        task = work.order.task
        about = {**known, "model": task.model, "client": task.client, "id": task.id}
        pixels = filtered(work.model.filter, pixels, about)
    return Drawn(
        pixels=pixels,
        parameters=str(picture.settings.parameters()),
        request=known,
        tokens=work.model.tokens(request.prompt),
        seconds={
            "queue": work.begun - accepted,
            "encode": work.encoded - work.begun,
            "denoise": work.last_run - work.first_run,
            "decode": decoding,
            "total": time.monotonic() - accepted,
        },
    )


def is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, BackendError) and "memory" in str(error).lower())


def failure_of(error: Exception) -> ServingError:
    """What a client is told of an exception."""
    if isinstance(error, ServingError):
        return error
    if is_memory(error):
        return OutOfMemoryError("there is not enough memory for this picture; ask for a smaller one")
    if isinstance(error, InputError):
        return RequestRefusedError(said(error))
    if not isinstance(error, CalotypeError):
        logger.error("a picture failed", exc_info=error)
    return DrawingError(said(error))
