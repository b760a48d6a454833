"""What stands in the sessions' input buffers, so that a row's inputs are written when they change alone."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.denoising.job import Key, Layout, SessionKey
from calotype.runtime.sessions.session import Session, Sizes


class Pool:
    """The buffers of every session that was used; a session that is gone is forgotten."""

    def __init__(self, sessions: Callable[[SessionKey], Session]) -> None:
        self._sessions = sessions
        self._buffers: dict[SessionKey, Buffers] = {}

    def of(self, key: Key) -> tuple[Session, Buffers]:
        """The session that a key names, and its buffers."""
        session = self._sessions(key.session)
        found = self._buffers.get(key.session)
        if found is None or found.session() is not session:
            self._buffers = {known: own for known, own in self._buffers.items() if own.session() is not None}
            found = self._buffers[key.session] = Buffers(session)
        return session, found


@dataclasses.dataclass(kw_only=True)
class Run:
    """The input buffers of a run of so many rows of one layout.

    Attributes:
        sizes: of the network's symbols.
        stamps: by row, of what stands there.
        features: likewise of what T2I-Adapters add; 0 is zeros.
        residuals: whether something else than zeros stands in what ControlNets add.
    """

    sizes: Sizes
    stamps: list[int]
    features: list[int]
    residuals: bool = False


class Buffers:
    """What stands in a session's input buffers: a row's inputs are written when they change.

    Rows are known by their stamps, numbers, so that a job that is done is not kept alive; neither is the session.
    """

    def __init__(self, session: Session) -> None:
        self.session, self._generation = weakref.ref(session), session.generation
        self._symbols: dict[object, Sizes] = {}
        self._runs: dict[tuple[object, int], Run] = {}

    def symbols(self, session: Session, layout: Layout) -> Sizes:
        """The sizes of runs of rows of that layout, without their number."""
        found = self._symbols.get(layout)
        if found is None:
            found = self._symbols[layout] = _symbols(session.inputs, layout)
        return found

    def run(self, session: Session, layout: Layout, rows: int) -> Run:
        """Have buffers for a run of so many rows."""
        if session.generation != self._generation:
            self._forget(session)
        found = self._runs.get((layout, rows))
        if found is None:
            sizes = {"rows": rows, **self.symbols(session, layout)}
            session.reserve(sizes)
            if session.generation != self._generation:
                self._forget(session)
            found = self._runs[layout, rows] = Run(sizes=sizes, stamps=[0] * rows, features=[0] * rows)
        return found

    def _forget(self, session: Session) -> None:
        """What was written is lost."""
        self._generation = session.generation
        self._runs.clear()
        self._symbols.clear()


def _symbols(inputs: Sequence[TensorSpec], layout: Layout) -> Sizes:
    """The sizes of all symbols but the rows', by the shapes of one row's inputs.

    Raises:
        InputError: an input has another shape than the network takes.
    """
    shapes, symbols = dict(layout), dict[str, int]()
    for spec in inputs:
        shape = shapes.get(spec.name)
        if shape is not None:
            spec.match_row(shape, symbols)
    return symbols
