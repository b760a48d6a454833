"""Networks that take turns: one alone is open, and so has weights and activations in memory."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.sessions.session import Session, Sizes


class Turn:
    """Whose turn it is, among the sessions that share this."""

    def __init__(self) -> None:
        self.holder: TurnTakingSession | None = None


class TurnTakingSession:
    """See :class:`calotype.runtime.sessions.session.Session`. Opened with ``opener`` when it is used, which closes the
    one whose turn it was; what that had in its buffers is lost, so a network's outputs are read before the next runs.
    """

    def __init__(self, spec: ModelSpec, opener: Callable[[], Session], turn: Turn) -> None:
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self._opener, self._turn = opener, turn
        self._session: Session | None = None
        self._reserved: set[tuple[tuple[str, int], ...]] = set()

    def takes(self, sizes: Sizes) -> bool:
        """See :meth:`Session.takes`."""
        return self._on_turn().takes(sizes)

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`. Waits for its turn: what is reserved beforehand would be closed again."""

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        return self._opened(sizes).buffer(name, sizes)

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        self._opened(sizes).run(sizes)

    def close(self) -> None:
        """See :meth:`Session.close`."""
        if self._session is not None:
            session, self._session = self._session, None
            self._reserved.clear()
            self._turn.holder = None
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_turn(self) -> Session:
        if self._session is None:
            if self._turn.holder is not None:
                self._turn.holder.close()
            self._session = self._opener()
            self._turn.holder = self
        return self._session

    def _opened(self, sizes: Sizes) -> Session:
        session, key = self._on_turn(), tuple(sizes.items())
        if key not in self._reserved:
            session.reserve(sizes)
            self._reserved.add(key)
        return session
