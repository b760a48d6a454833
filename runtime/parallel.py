"""Doing several things at the same time, so that whatever ends one of them ends all, cleanly."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_parallel(function: Callable[[T], R], items: Iterable[T], *, most: int = 8) -> list[R]:
    """``function`` of each of ``items``, in their order, in up to ``most`` threads.

    This thread takes part, and does all where others cannot be started. When a call fails, or an interrupt reaches this
    thread, no further one is begun. Those that run are waited for, however often one is interrupted meanwhile: a
    process that ends while native code runs in a thread crashes. Then the first of the errors is raised.
    """
    work = _Work(function, list(items))
    threads: list[threading.Thread] = []
    try:
        with contextlib.suppress(RuntimeError, MemoryError):  # there can be no more
            for _ in range(min(most, len(work.items)) - 1):
                threads.append(threading.Thread(target=work.take_part, daemon=True))
                threads[-1].start()
        work.take_part()
    except BaseException as error:
        work.errors.append(error)
    finally:
        _join(threads, work.errors)
    if work.errors:
        raise work.errors[0]
    return [work.results[number] for number in range(len(work.items))]


class _Work(Generic[T, R]):
    """What is to be done, and what has come of it."""

    def __init__(self, function: Callable[[T], R], items: list[T]) -> None:
        self.items, self.results, self.errors = items, dict[int, R](), list[BaseException]()
        self._function, self._numbers, self._lock = function, iter(range(len(items))), threading.Lock()

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


def _join(threads: list[threading.Thread], errors: list[BaseException]) -> None:
    while True:
        try:
            for thread in threads:
                if thread.is_alive():
                    thread.join()
            return
        except BaseException as error:  # an interrupt
            errors.append(error)
