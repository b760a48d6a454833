"""A worker process, watched: its death and its hangs are noticed, and it is started again.

Two threads read what it says and what it complains of, and one writes; all of them tell one function, in order. None
of them knows a task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from calotype.serving.errors import DrawingError
from calotype.serving.wording import said, without_paths
from calotype.serving.workers.messages import Failed, Order, Report, Running, Stop, Submit

COMMAND = (sys.executable, "-P", "-m", "calotype.serving.workers.worker")
FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0  # seconds before a worker is started again; doubled each time it dies in a row
TIMES_LONGER = 10  # than predicted, and it hangs
HANG_SECONDS = 30.0  # and never earlier than this
KEPT_LINES = 20  # of what it complained of last
GRACE = 5.0  # seconds for a worker to end by itself
IDLE = "idle"
STARTING = 30.0  # seconds that a process is predicted to take until it says something
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Up:
    """A process runs; ``link`` takes orders for this process alone, and those after its death are lost."""

    link: Link


@dataclasses.dataclass(frozen=True, kw_only=True)
class Down:
    """It is dead; ``why`` in one line, and which tasks were in what it was doing."""

    why: str
    ids: tuple[str, ...]


News = Up | Down | Report


class Link:
    """One process, and the way to it.

    Args:
        command: what starts it; the number of its socket follows.
        refuse: is told of orders that cannot be sent, and why.

    Attributes:
        heard: when it said something last.
        running: what it said that it does.
        killed_for: why it was ended from here; None where it was not.
    """

    def __init__(self, command: Sequence[str], refuse: Callable[[Order, Exception], None]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # an interrupt from the terminal is for the process that serves alone
                )
            except BaseException:
                ours.close()
                raise
        self.connection = Connection(ours.detach())
        self.heard = time.monotonic()
        self.running = Running(ids=(), what="start", seconds=STARTING)
        self.killed_for: str | None = None
        self._refuse = refuse
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._threads = [
            threading.Thread(target=work, name=f"{work.__name__} {self.process.pid}", daemon=True)
            for work in (self._write, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, order: Order) -> None:
        """Have an order written, soon; this waits for nothing."""
        self._orders.put(order)

    def kill(self, why: str) -> None:
        """End the process, stopped or not."""
        if self.killed_for is None:
            self.killed_for = why
            self.process.kill()

    def reports(self) -> Iterator[Report]:
        """What it says, until it is dead."""
        while True:
            try:
                report = self.connection.recv()
            except Exception:  # the end, or what a process that broke off has left
                return
            self.heard = time.monotonic()
            if isinstance(report, Running):
                self.running = report
            yield report

    def bury(self) -> str:
        """Wait for the end of the process and of the threads, give all back, and say why it died."""
        self.process.kill()
        code = self.process.wait()
        self._orders.put(None)
        for thread in self._threads:
            thread.join()
        self.connection.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        if self.killed_for is not None:
            return self.killed_for
        if code < 0:  # native code's own traceback begins so; before a signal from outside nothing was said of it
            how, lines = f"was ended by signal {-code}", [line for line in self._lines if line.startswith("Fatal ")]
        else:
            how, lines = f"ended with code {code}", [line for line in self._lines if line]
        return f"{how}; its last words: {lines[-1]}" if lines else how

    def _write(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self.connection.send(order)
            except OSError:  # it is dead, which its reader notices
                return
            except Exception as error:  # what cannot be pickled
                self._refuse(order, error)

    def _listen(self) -> None:
        """Read what it complains of, which is logged here, too."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._lines.append(without_paths(text))
            logger.warning("worker %d: %s", self.process.pid, text)


class Supervisor:
    """Keeps one worker process running.

    Args:
        number: of the worker, for logs.
        tell: is called with all news, in their order, in a thread of this supervisor.
        command: what starts a process.
        hang_seconds: before so many, no silence is a hang.

    Attributes:
        starts: of processes so far.
        in_a_row: deaths since a process was last of use.
        why: what the last one died of; "" where none has died.
    """

    def __init__(
        self,
        number: int,
        tell: Callable[[News], None],
        *,
        command: Sequence[str] = COMMAND,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self._number, self._tell, self._command, self._hang_seconds = number, tell, command, hang_seconds
        self.starts = self.in_a_row = 0
        self.why = ""
        self._link: Link | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name=f"worker {number}", daemon=True)

    @property
    def process_id(self) -> int | None:
        """Of the process that runs; None while none does."""
        link = self._link
        return None if link is None else link.process.pid

    def start(self) -> None:
        """Start the first process; the thread that does it keeps it running."""
        self._thread.start()

    def praise(self) -> None:
        """Say that the process was of use: if it dies now, that is a new beginning."""
        self.in_a_row = 0

    def check(self, *, busy: bool) -> None:
        """End the process if it hangs: it has said nothing for too long, and is ``busy`` or has not said it is idle."""
        link = self._link
        if link is None or (link.running.what == IDLE and not busy):
            return
        limit = max(self._hang_seconds, TIMES_LONGER * link.running.seconds)
        silent = time.monotonic() - link.heard
        if silent > limit:
            predicted = f"{link.running.what}, predicted to take {link.running.seconds:.1f} s"
            link.kill(f"hung: it has said nothing for {silent:.0f} s ({predicted})")

    def wake(self) -> None:
        """Count silence from now on, since something to do was given to an idle process."""
        if self._link is not None:
            self._link.heard = time.monotonic()

    def stop(self) -> None:
        """End the process and all threads: within moments where it listens, else after a few seconds."""
        with self._lock:
            self._stopping.set()
            link = self._link
        if link is not None:
            link.send(Stop())
            with contextlib.suppress(subprocess.TimeoutExpired):
                link.process.wait(GRACE)
            link.kill("it was stopped")
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self.starts += 1
            why, ids = self._live()
            if self._stopping.is_set():
                return
            self.why = why
            self.in_a_row += 1
            logger.error("worker %d %s", self._number, why)
            self._tell(Down(why=why, ids=ids))
            self._stopping.wait(min(FIRST_DELAY * 2 ** (self.in_a_row - 1), LONGEST_DELAY))

    def _live(self) -> tuple[str, tuple[str, ...]]:
        """One process from its start to its end; returns why that came, and the tasks that it was busy with."""
        try:
            link = Link(self._command, self._refuse)
        except OSError as error:
            return f"cannot be started: {without_paths(str(error))}", ()
        with self._lock:
            self._link = link
            if self._stopping.is_set():  # nobody else will end it
                link.kill("it was stopped")
        self._tell(Up(link=link))
        for report in link.reports():
            self._tell(report)
        with self._lock:
            self._link = None
        return link.bury(), link.running.ids

    def _refuse(self, order: Order, error: Exception) -> None:
        if isinstance(order, Submit):
            self._tell(Failed(id=order.task.id, error=DrawingError(f"it cannot be handed on: {said(error)}")))
        else:
            logger.error("worker %d cannot be told %s: %s", self._number, type(order).__name__, error)
