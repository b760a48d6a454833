"""A worker: the process that owns the open models of one device, and draws with them in one loop.

``python -m calotype.serving.workers.worker NUMBER`` with the number of an open socket, over which it is told what to do
and says what it does; it ends when that is closed. All but the loading of models happens in its main thread: take
orders, ask the batcher what is next, do it, say what came of it, and open and warm models in between.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from calotype.runtime.denoising.job import Key
from calotype.serving.errors import NotReadyError
from calotype.serving.workers import batcher as batching
from calotype.serving.workers.batcher import Batcher
from calotype.serving.workers.costs import Costs
from calotype.serving.workers.memory import resident
from calotype.serving.workers.messages import Cancel, Memory, Open, Order, Skip, Stop, Submit, Unload, Warm
from calotype.serving.workers.opening import OPENING, Openings
from calotype.serving.workers.reporter import Reporter
from calotype.serving.workers.stages import Stages
from calotype.serving.workers.works import Model, Work

# Their warnings quote prompts, which are in no log unless somebody asks for it.
QUOTING = ("calotype.runtime.preparation", "calotype.runtime.text")


class Worker:
    """The loop of the process; see the module."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        costs = Costs()
        self._reporter, self._batcher = Reporter(connection, costs), Batcher(costs, self)
        self._stages = Stages(self._batcher, self._reporter)
        self._openings = Openings(self._reporter, self._closing)

    def capacity(self, model: str, key: Key) -> int:
        """See :class:`calotype.serving.workers.batcher.Engine`; what cannot be opened says so when it runs alone."""
        try:
            return self._openings.models[model].pipeline.capacity(key)
        except Exception:
            return 0

    def padded(self, model: str, key: Key, rows: int) -> int:
        """See :class:`calotype.serving.workers.batcher.Engine`."""
        try:
            return self._openings.models[model].pipeline.padded(key, rows)
        except Exception:
            return rows

    def kept(self, model: str, weights: Any) -> bool:
        """See :class:`calotype.serving.workers.batcher.Engine`; an outline knows no digests of LoRAs."""
        wanted, sessions = _plain(weights), self._openings.models[model].pipeline.networks.sessions
        return any(_plain(key.weights) == wanted for key in sessions)

    def serve(self) -> None:
        """Work until told to stop, or until nobody is there any more."""
        while self._listen():
            self._stages.do(self._batcher.next(time.monotonic()))
            if self._openings.pending and not self._stages.alone:
                self._openings.advance()

    @property
    def loading(self) -> bool:
        """Whether a thread is busy that the end of the process would wait for."""
        return self._openings.loading

    def _listen(self) -> bool:
        """Take the orders that are here, and wait for one where there is nothing to do; returns whether to go on."""
        while True:
            if not self._connection.poll():
                if self._batcher.ids or self._openings.pending:
                    return True
                self._rest()
                if self._connection not in wait([self._connection, self._openings.bell]):
                    return True
            try:
                order: Order = self._connection.recv()
            except (EOFError, OSError):
                return False
            if isinstance(order, Stop):
                return False
            self._take(order)

    def _rest(self) -> None:
        """Give back what large pictures have taken, and say that nothing is left to do but to wait for a model."""
        for model in self._openings.models.values():
            if model.used:
                model.pipeline.trim()
                model.used = False
        now, peak = resident()
        self._reporter.say(Memory(resident=now, peak=peak))
        self._reporter.running(self._openings.what or "idle", OPENING if self._openings.loading else 0.0)

    def _take(self, order: Order) -> None:
        match order:
            case Submit():
                self._submit(order)
            case Cancel(id=id):
                self._stages.forget(id)
            case Skip(id=id):
                self._batcher.skip(id)
            case Open() | Warm():
                self._openings.order(order)
            case Unload(name=name):
                self._openings.close(name)

    def _submit(self, order: Submit) -> None:
        task = order.task
        model = self._openings.models.get(task.model)
        if model is None:
            self._reporter.failed(task.id, NotReadyError(f"{task.model} is not open any more"))
            return
        self._stages.works[task.id] = Work(order=order, model=model)
        self._batcher.add(
            batching.Ticket(
                id=task.id,
                outline=order.outline,
                arrived=order.accepted,
                deadline=task.deadline,
                priority=task.priority,
            )
        )

    def _closing(self, model: Model) -> None:
        for work in self._stages.of(model):
            self._stages.fail(work, NotReadyError(f"{model.name} was unloaded"))


def _plain(weights: Any) -> list[tuple[Path, float]]:
    return [(lora.path, lora.scale) for lora in weights]


def main(arguments: Sequence[str]) -> None:
    """Serve over the socket of that number until it is closed."""
    # Who serves decides when it ends, also where a whole group of processes is told to.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in QUOTING:
        logging.getLogger(name).setLevel(logging.ERROR)
    descriptor = int(arguments[0])
    os.set_inheritable(descriptor, False)
    with (
        contextlib.suppress(BrokenPipeError, ConnectionResetError),  # nobody is there any more
        Connection(descriptor) as connection,
    ):
        worker = Worker(connection)
        worker.serve()
        if worker.loading:
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
