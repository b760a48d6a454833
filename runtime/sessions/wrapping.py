"""Sessions that have another one do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from calotype.runtime.errors import BackendError
from calotype.runtime.sessions.session import BaseSession, Changes, Session, Sizes


class WrappingSession(BaseSession):
    """Hands everything on to the session that ``_wrapped`` names; see :class:`Session`."""

    @property
    def generation(self) -> int:
        """See :attr:`Session.generation`."""
        return self._wrapped().generation

    @property
    def keeps_bytes(self) -> bool:
        """See :attr:`Session.keeps_bytes`."""
        return self._wrapped().keeps_bytes

    @property
    def engine(self) -> Path | None:
        """See :attr:`Session.engine`."""
        return self._wrapped().engine

    @property
    def own_bytes(self) -> int:
        """See :attr:`Session.own_bytes`."""
        return self._wrapped().own_bytes

    def operators(self) -> dict[str, float]:
        """See :meth:`Session.operators`."""
        return self._wrapped().operators()

    def capacity(self, sizes: Sizes) -> int:
        """See :meth:`Session.capacity`."""
        return self._wrapped().capacity(sizes)

    def padded(self, rows: int) -> int:
        """See :meth:`Session.padded`."""
        return self._wrapped().padded(rows)

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`."""
        self._wrapped().reserve(sizes)

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        return self._wrapped().buffer(name, sizes)

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        self._wrapped().run(sizes)

    def link(self, name: str, other: Session, output: str) -> None:
        """See :meth:`Session.link`."""
        self._wrapped().link(name, other, output)

    def take(self, name: str, sizes: Sizes, other: Session, output: str, other_sizes: Sizes) -> None:
        """See :meth:`Session.take`."""
        self._wrapped().take(name, sizes, other, output, other_sizes)

    def defer_outputs(self) -> None:
        """See :meth:`Session.defer_outputs`."""
        self._wrapped().defer_outputs()

    def set_weights(self, changes: Changes | None) -> None:
        """See :meth:`Session.set_weights`."""
        self._wrapped().set_weights(changes)

    def trim(self) -> None:
        """See :meth:`Session.trim`."""
        self._wrapped().trim()

    def outlet(self) -> BaseSession:
        """See :meth:`BaseSession.outlet`."""
        wrapped = self._wrapped()
        if not isinstance(wrapped, BaseSession):
            raise BackendError(f"{self._name} has no outputs that can be linked to")
        return wrapped.outlet()

    def _wrapped(self) -> Session:
        raise NotImplementedError
