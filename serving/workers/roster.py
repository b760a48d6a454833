"""Which models are served, and at which workers each is open, is being opened, or cannot be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from calotype.serving.errors import ConflictError, UnknownModelError
from calotype.serving.service import ModelState
from calotype.serving.workers.memory import Footprint
from calotype.serving.workers.messages import OpenFailed, Ready, Size, Unload, Warm
from calotype.serving.workers.places import Place
from calotype.serving.workers.served import Served
from calotype.serving.workers.supervisor import Link

RETRY_AFTER = 10.0  # seconds, where it is not known how long opening a model takes


class Roster:
    """See the module.

    Args:
        models: in the order in which they are listed; the first is the default.
        places: the workers; each opens all of them.

    Attributes:
        models: those that are served, by name.
    """

    def __init__(self, models: Iterable[Served], places: Sequence[Place]) -> None:
        self.models = {model.name: model for model in models}
        self._named = dict(self.models)  # those that were unloaded among them
        self._places = places
        self._numbers = itertools.count(1)

    def model(self, name: str) -> Served:
        """The one of that name; raises UnknownModelError."""
        if name not in self.models:
            valid = ", ".join(self.models) or "none"
            raise UnknownModelError(f"there is no model {name!r}; valid: {valid}")
        return self.models[name]

    def named(self, name: str) -> Served:
        """One that the configuration names, to be opened.

        Raises:
            UnknownModelError: it names none of that name.
            ConflictError: it is being opened.
        """
        if name not in self._named:
            valid = ", ".join(self._named) or "none"
            raise UnknownModelError(f"the configuration names no model {name!r}; valid: {valid}")
        if name in self.models and not self.failure(name) and not all(name in place.ready for place in self._places):
            raise ConflictError(f"{name} is being opened")
        return self._named[name]

    # What is done.

    def open(self, model: Served) -> None:
        """Have every worker open it, in place of what it had under that name."""
        before = self.models.get(model.name)
        if before is not None:
            model.was_open = model.was_open or before.was_open
        self.models[model.name] = self._named[model.name] = model
        for place in self._places:
            place.forget(model.name)
            self._open(place, model)

    def unload(self, name: str) -> None:
        """Have every worker close it; raises UnknownModelError."""
        self.model(name)
        del self.models[name]
        for place in self._places:
            place.forget(name)
            place.send(Unload(name=name))

    def warm(self, name: str, sizes: Sequence[Size]) -> None:
        """Have it drawn with at ``sizes`` once, where it is open.

        Raises:
            UnknownModelError: there is none.
            InputError: it cannot draw at one of them.
        """
        self.model(name).check_sizes(sizes)
        for place in self._places:
            if name in place.ready:
                place.send(Warm(name=name, sizes=tuple(sizes)))

    # What workers say.

    def up(self, place: Place, link: Link) -> None:
        """A process runs, and has nothing open."""
        place.link = link
        place.failed.clear()
        for model in self.models.values():
            self._open(place, model)

    def down(self, place: Place) -> None:
        """It is dead."""
        place.link = None
        place.ready.clear()
        place.opening.clear()

    def ready(self, place: Place, news: Ready) -> None:
        """A model is open there; what another order than the last has opened is no news."""
        name = news.name
        if not self._is_last(place, news):
            return
        if place.opening.pop(name, None) is not None:
            place.ready[name], place.opened_in[name] = news, news.seconds
            place.measured.add(name)
            self.models[name].was_open = True
        place.footprints[name] = place.footprints.get(name, Footprint()).joined(news.footprint)

    def open_failed(self, place: Place, news: OpenFailed) -> None:
        """A model cannot be opened there."""
        if self._is_last(place, news):
            place.opening.pop(news.name, None)
            place.failed[news.name] = news.why

    # What is known.

    def is_ready(self, name: str) -> bool:
        """Whether some worker has it open."""
        return any(name in place.ready for place in self._places)

    def awaited(self, name: str) -> bool:
        """Whether it is open, or some worker will have it open if all goes well."""
        return name in self.models and (self.is_ready(name) or any(place.expects(name) for place in self._places))

    def accepts(self, name: str) -> bool:
        """Whether new tasks are taken for it: nobody waits for one that was never open."""
        return self.is_ready(name) or (self.models[name].was_open and self.awaited(name))

    def settled(self) -> bool:
        """Whether every worker has opened each model, or could not; or all of them die again and again."""
        return all(place.hopeless for place in self._places) or all(
            name in place.ready or name in place.failed for place in self._places for name in self.models
        )

    def failure(self, name: str) -> str:
        """Why no worker could open it; "" where one has, or tries."""
        if self.is_ready(name) or any(name not in place.failed for place in self._places):
            return ""
        return self._places[0].failed[name]

    def why(self, name: str) -> str:
        """What keeps it from being ready, one line; "" where nothing does."""
        if self.is_ready(name):
            return ""
        if self.models[name].why:
            return self.models[name].why
        if failure := self.failure(name):
            return failure
        for place in self._places:
            if place.supervisor.in_a_row:
                times = place.supervisor.in_a_row
                what = "its worker has died" if times == 1 else f"its worker has died {times} times in a row"
                return f"{what}, and is started again: it {place.supervisor.why}"
        return "it is being opened"

    def retry_after(self, name: str) -> float:
        """In how many seconds it may be worth another try, where it is not ready: as long as opening took before."""
        return max((place.opened_in.get(name, 0.0) for place in self._places), default=0.0) or RETRY_AFTER

    def state(self, name: str, *, stopping: bool) -> ModelState:
        """What the HTTP side sees of it."""
        model = self.models[name]
        return ModelState(
            name=name,
            manifest=model.manifest,
            digest=model.digest,
            ready=self.is_ready(name) and not stopping,
            why="the server is stopping" if stopping else self.why(name),
            created=model.created,
            loras=tuple(model.loras),
            controls=tuple(model.open.controls),
        )

    def _open(self, place: Place, model: Served) -> None:
        if place.link is None:  # all are opened when it is up
            return
        name, number = model.name, next(self._numbers)
        place.ready.pop(name, None)
        place.opening[name] = number
        known = tuple(place.known[name]) if name in place.measured else ()
        threads = model.open.threads or place.threads
        place.send(dataclasses.replace(model.open, number=number, device=place.device, threads=threads, known=known))

    def _is_last(self, place: Place, news: Ready | OpenFailed) -> bool:
        """Whether it is of the last order to open that model there, or of what that has opened and warmed since."""
        name, ready = news.name, place.ready.get(news.name)
        last = place.opening.get(name, None if ready is None else ready.number)
        return name in self.models and last == news.number
