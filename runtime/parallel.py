"""Doing several things at the same time, so that whatever ends one of them ends all, cleanly."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_parallel(
    function: Callable[[T], R], items: Iterable[T], *, most: int = 8, discard: Callable[[R], object] = lambda _: None
) -> list[R]:
    """``function`` of each of ``items``, in their order, in up to ``most`` threads.

    This thread takes part, and does all where others cannot be started. When a call fails, or an interrupt reaches this
    thread, no further one is begun. Those that run are waited for, however often one is interrupted meanwhile: a
    process that ends while native code runs in a thread crashes. Then what was made is given to
    ``discard``, and the first of the errors is raised.
    """
    work = _Work(function, list(items))
    try:
        with contextlib.suppress(RuntimeError, MemoryError):  # there can be no more
            for _ in range(min(most, len(work.items)) - 1):
                threading.Thread(target=work.take_part_in_thread, daemon=True).start()
        work.take_part()
    except BaseException as error:
        work.errors.append(error)
    finally:
        work.wait()
    if work.errors:
        for result in work.results.values():
            discard(result)
        raise work.errors[0]
    return [work.results[number] for number in range(len(work.items))]


class _Work(Generic[T, R]):
    """What is to be done, and what has come of it."""

    def __init__(self, function: Callable[[T], R], items: list[T]) -> None:
        self.items, self.results, self.errors = items, dict[int, R](), list[BaseException]()
        self._function, self._numbers = function, iter(range(len(items)))
        self._lock, self._running, self._ends = threading.Lock(), 0, SimpleQueue[None]()

    def take_part(self) -> None:
        """Take one after the other, until there are none or one has failed."""
        try:
            while True:
                with self._lock:
                    number = None if self.errors else next(self._numbers, None)
                if number is None:
                    return
                self.results[number] = self._function(self.items[number])
        except BaseException as error:
            self.errors.append(error)

    def take_part_in_thread(self) -> None:
        """The same, waited for by :meth:`wait`."""
        with self._lock:
            self._running += 1
        self.take_part()
        with self._lock:
            self._running -= 1
        self._ends.put(None)

    def wait(self) -> None:
        """Wait for the threads that have begun; those that have not will find nothing to do.

        Not by joining them: in Python 3.11 a thread counts as ended once joining it was interrupted.
        """
        while True:
            try:
                while self._running:
                    self._ends.get()
                return
            except BaseException as error:  # an interrupt
                self.errors.append(error)
