"""What the HTTP side and a worker tell each other, pickled over a socket; both ends are ours, and of one version."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.pictures.autoencoder import Tiles
from calotype.runtime.text.textual_inversion import Embedding
from calotype.serving.errors import ServingError
from calotype.serving.tasks import Event, Task
from calotype.serving.workers.costs import Outline
from calotype.serving.workers.memory import Footprint

Size = tuple[int, int]  # width and height in pixels


class Observation(NamedTuple):
    """How long a part of a picture's way took; see :meth:`calotype.serving.workers.costs.Costs.observe`."""

    model: str
    stage: str
    area: int
    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open:
    """Open a model and warm it; answered by :class:`Ready` or :class:`OpenFailed`.

    Attributes:
        number: of this order; its answer repeats it, so that none is taken for that of a later one.
        name: under which it is served.
        bundle: a bundled model's name, or a folder.
        backend: a name in ``BACKENDS``, or ``"auto"``.
        device: which GPU; None is the first.
        threads: that a CPU computes with; None is as many as may be used.
        low_memory: keep one network in memory at a time.
        fast: whether requests that say nothing of it are drawn fast.
        loras: what is merged for requests that name none.
        embeddings: words of textual inversion that prompts may use.
        controls: folders of ControlNets' bundles, by the names that requests use.
        safety_checker: whether pictures are shown to the model's own.
        output_filter: ``module:function``, what every picture has to pass; "" is nothing.
        vae: a bundle whose autoencoder takes the place of the model's own.
        tiles: whether large pictures go through the autoencoder in tiles.
        sha256: a pin: what the hash of the bundle's manifest has to be; None is any.
        sizes: to warm; none is the model's own.
        known: what was measured when a process of this worker opened it before; it is not measured again.
    """

    name: str
    bundle: str | Path
    number: int = 0
    backend: str = "auto"
    device: int | None = None
    threads: int | None = None
    low_memory: bool = False
    fast: bool = False
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    controls: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    safety_checker: bool = False
    output_filter: str = ""
    vae: str | Path | None = None
    tiles: Tiles | None = None
    sha256: str | None = None
    sizes: tuple[Size, ...] = ()
    known: tuple[Observation, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unload:
    """Close a model; its tasks fail."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm:
    """Draw once at ``sizes``, so that the first request of each need not wait; answered by :class:`Ready`."""

    name: str
    sizes: tuple[Size, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submit:
    """Draw a task.

    Attributes:
        task: what is to be drawn.
        outline: what that takes.
        accepted: when, in seconds of ``time.monotonic()``.
        alone: whether its runs are its own; a run of several that killed a worker says nothing of which it was.
    """

    task: Task
    outline: Outline
    accepted: float
    alone: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cancel:
    """Drop a task; nothing is answered."""

    id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """Decode what there is of a task after the step at hand."""

    id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """End the process, whatever it has."""


Order = Open | Unload | Warm | Submit | Cancel | Skip | Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """What begins now; until the next message, whatever goes wrong is the doing of these tasks.

    Attributes:
        ids: the tasks that are in it.
        what: a word for logs: ``open``, ``encode``, ``denoise``, ``decode``; ``idle`` says that nothing is left to do.
        seconds: how long it should take.
    """

    ids: tuple[str, ...]
    what: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Happened:
    """What came of what was running.

    Attributes:
        events: of tasks, by id, in their order; several, since a run moves several.
        observations: how long it took.
    """

    events: tuple[tuple[str, Event], ...] = ()
    observations: tuple[Observation, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A task ends without a picture."""

    id: str
    error: ServingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """A model is open and warm.

    Attributes:
        name: of the model.
        number: of the order that opened it.
        backend: that it is open on.
        seconds: that opening and warming took.
        footprint: what pictures take of the machine's memory; nothing known on a GPU, and where it was measured before.
    """

    name: str
    number: int
    backend: str
    seconds: float
    footprint: Footprint = dataclasses.field(default_factory=Footprint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenFailed:
    """A model could not be opened, as the order of that number asked; one line says why."""

    name: str
    number: int
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Closed:
    """A model is closed, as :class:`Unload` asked."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What the process takes now, and at most so far, in bytes: of the machine, and of its GPU where it has one."""

    resident: int
    peak: int
    device: int | None = None


Report = Running | Happened | Failed | Ready | OpenFailed | Closed | Memory
