"""Networks that take turns: one alone is open, and so has weights and activations in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError
from calotype.runtime.sessions.session import BaseSession, Session, Sizes
from calotype.runtime.sessions.wrapping import WrappingSession


class Turn:
    """Whose turn it is, among the sessions that share this."""

    def __init__(self) -> None:
        self.holder: TurnTakingSession | None = None


class TurnTakingSession(WrappingSession):
    """See :class:`calotype.runtime.sessions.session.Session`. Opened with ``opener`` when it is used, which closes the
    one whose turn it was; what that had in its buffers is lost, so a network's outputs are read before the next runs.
    """

    def __init__(self, spec: ModelSpec, opener: Callable[[], Session], turn: Turn) -> None:
        super().__init__(spec.inputs, spec.outputs, next(iter(spec.graphs.values())))
        self._opener, self._turn = opener, turn
        self._session: Session | None = None
        # What is asked between turns is remembered, so that asking closes nobody.
        self._capacities: dict[tuple[tuple[str, int], ...], int] = {}
        self._about: tuple[bool, Path | None] | None = None

    @property
    def generation(self) -> int:
        """See :attr:`Session.generation`."""
        return self._generation + (0 if self._session is None else self._session.generation)

    @property
    def keeps_bytes(self) -> bool:
        """See :attr:`Session.keeps_bytes`."""
        return self._described()[0]

    @property
    def engine(self) -> Path | None:
        """See :attr:`Session.engine`."""
        return self._described()[1]

    @property
    def own_bytes(self) -> int:
        """See :attr:`Session.own_bytes`. Between turns it has none, and in one they are all that there is."""
        return 0

    def capacity(self, sizes: Sizes) -> int:
        """See :meth:`Session.capacity`."""
        key = tuple(sizes.items())
        if key not in self._capacities:
            self._capacities[key] = self._wrapped().capacity(sizes)
        return self._capacities[key]

    def operators(self) -> dict[str, float]:
        """See :meth:`Session.operators`. Of the turn that it has."""
        return {} if self._session is None else self._session.operators()

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`. Waits for its turn: what is reserved beforehand would be closed again."""
        self._check_usable()
        if self._session is not None:
            self._session.reserve(sizes)

    def trim(self) -> None:
        """See :meth:`Session.trim`."""
        self._check_usable()
        if self._session is not None:
            self._session.trim()

    def outlet(self) -> BaseSession:
        """See :meth:`BaseSession.outlet`."""
        raise BackendError(f"{self._name} takes turns with others, and what it has made is gone with its turn")

    def link(self, name: str, other: Session, output: str) -> None:
        """See :meth:`Session.link`."""
        raise BackendError(f"{self._name} takes turns with others, and cannot read what is gone with theirs")

    def _wrapped(self) -> Session:
        self._check_usable()
        if self._session is None:
            if self._turn.holder is not None:
                self._turn.holder._surrender()
            self._session = self._opener()
            self._turn.holder = self
        return self._session

    def _described(self) -> tuple[bool, Path | None]:
        if self._about is None:
            session = self._wrapped()
            self._about = session.keeps_bytes, session.engine
        return self._about

    def _surrender(self) -> None:
        """End the turn that it has."""
        if self._session is not None:
            session, self._session = self._session, None
            self._generation += session.generation + 1
            self._turn.holder = None
            session.close()

    def _close(self) -> None:
        self._surrender()
