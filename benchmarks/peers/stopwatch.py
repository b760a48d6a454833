"""Where the time of a call went, seen from outside: by networks that are called and steps that end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Stopwatch:
    """Seconds of each step, from the first call of the network ``unet`` on, and of each network in all."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.stages: dict[str, float] = {}
        self._last: float | None = None

    def step(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        assert self._last is not None
        self.steps.append(now - self._last)
        self._last = now

    @contextlib.contextmanager
    def around(self, network: Any, name: str) -> Iterator[None]:
        """Time the calls of ``network.forward``."""
        forward = network.forward

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            if name == "unet" and self._last is None:
                self._last = begin
            result = forward(*arguments, **named)
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin
            return result

        network.forward = timed
        try:
            yield
        finally:
            network.forward = forward
