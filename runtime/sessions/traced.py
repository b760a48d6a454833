"""Where the time of a call went: its stages, the runs of each network, and the operators inside."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from calotype.runtime.sessions.session import Session, Sizes
from calotype.runtime.sessions.wrapping import WrappingSession

LISTED = 6  # operators of a network; the rest are summed
SHOWN = 0.001  # seconds of a stage


@dataclasses.dataclass(kw_only=True)
class NetworkTrace:
    """Of one network: seconds spent in opening it and in its runs, how many, and seconds by operator.

    ``operators`` is empty where the backend does not tell them apart.
    """

    opening: float = 0.0
    runs: int = 0
    running: float = 0.0
    operators: dict[str, float] = dataclasses.field(default_factory=dict)


class Timed(Protocol):
    """What a table is made of: the timings of a pipeline's call, in seconds."""

    @property
    def total(self) -> float:
        """Of the whole call."""

    @property
    def runs(self) -> Sequence[float]:
        """Of each run of the denoising network."""


class Trace:
    """What the sessions that it opened did, by network; whole once they are closed."""

    def __init__(self) -> None:
        self.networks: dict[str, NetworkTrace] = {}
        self._lock = threading.Lock()  # networks are opened at the same time

    def open(self, network: str, opener: Callable[[], Session]) -> Session:
        """The session that ``opener`` opens, watched."""
        with self._lock:
            own = self.networks.setdefault(network, NetworkTrace())
        begin = time.perf_counter()
        session = opener()
        own.opening += time.perf_counter() - begin
        return _TracedSession(session, own)

    def to_json(self) -> dict[str, Any]:
        """As plain values; seconds."""
        return {name: dataclasses.asdict(own) for name, own in self.networks.items()}

    def text(self, timings: Timed, seconds: float) -> str:
        """A table for a person.

        Args:
            timings: those of a pipeline's output.
            seconds: from the start of loading to the end of drawing.
        """
        stages = {name: getattr(timings, name) for name in ("text_encoder", "vae_encoder", "denoising", "vae_decoder")}
        rows = [("loading the model", seconds - timings.total, "")]
        rows += [
            (name, spent, _runs(timings.runs) if name == "denoising" else "") for name, spent in stages.items() if spent
        ]
        lines = [f"{seconds:.3f} s, of which", *_table(rows, seconds)]
        ran = ((name, own) for name, own in self.networks.items() if own.runs)
        for name, own in sorted(ran, key=lambda item: -item[1].running):
            times = f"{own.runs} times, " if own.runs > 1 else ""
            lines.append(f"{name} ran {times}{own.running:.3f} s" + (", of which" if own.operators else ""))
            ordered = sorted(own.operators.items(), key=lambda item: -item[1])
            listed = [(operator, spent, "") for operator, spent in ordered[:LISTED]]
            rest = own.running - sum(spent for _, spent, _ in listed)
            if own.operators:
                lines += _table([*listed, ("all else", rest, "")], own.running)
        return "\n".join(lines)


class _TracedSession(WrappingSession):
    """See :class:`calotype.runtime.sessions.session.Session`."""

    def __init__(self, session: Session, trace: NetworkTrace) -> None:
        super().__init__(session.inputs, session.outputs, "the session")
        self._session, self._trace = session, trace

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        begin = time.perf_counter()
        self._session.run(sizes)
        self._trace.running += time.perf_counter() - begin
        self._trace.runs += 1

    def _wrapped(self) -> Session:
        return self._session

    def _close(self) -> None:
        for operator, spent in self._session.operators().items():
            self._trace.operators[operator] = self._trace.operators.get(operator, 0.0) + spent
        self._session.close()


def _runs(seconds: Sequence[float]) -> str:
    return f"{len(seconds)} runs, {1e3 * sum(seconds) / len(seconds):.1f} ms each" if seconds else ""


def _table(rows: list[tuple[str, float, str]], whole: float) -> list[str]:
    width = max(len(name) for name, _, _ in rows)
    return [
        f"  {name:<{width}} {spent:8.3f} s {100 * spent / whole:5.1f} %  {note}".rstrip() for name, spent, note in rows
    ]
