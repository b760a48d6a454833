"""Work in threads: its order, its first error, and ends that reach every thread."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from calotype.runtime.parallel import run_parallel


def test_results_are_in_order_and_calls_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=60)

    def call(number: int) -> int:
        together.wait()
        return number * number

    assert run_parallel(call, [3, 1, 2]) == [9, 1, 4]
    assert run_parallel(call, []) == []


def test_no_more_threads_than_asked_for() -> None:
    names = set(run_parallel(lambda _: threading.get_ident(), range(20), most=2))
    assert len(names) <= 2


@pytest.mark.parametrize("error", [ValueError("one"), MemoryError(), KeyboardInterrupt()])
def test_the_first_error_is_raised_and_no_more_is_begun(error: BaseException) -> None:
    begun: list[int] = []

    def call(number: int) -> None:
        begun.append(number)
        raise error

    with pytest.raises(type(error)) as caught:
        run_parallel(call, range(100), most=2)
    assert caught.value is error
    assert len(begun) <= 2


def test_what_was_made_is_discarded_when_another_fails() -> None:
    discarded: list[int] = []

    def call(number: int) -> int:
        if number == 2:
            raise ValueError(number)
        return number

    with pytest.raises(ValueError, match="2"):
        run_parallel(call, range(3), most=1, discard=discarded.append)
    assert discarded == [0, 1]
    assert run_parallel(call, range(2), discard=discarded.append) == [0, 1] == discarded


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_where_no_thread_can_be_started_this_one_does_all(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise error

    monkeypatch.setattr(threading.Thread, "start", start)
    assert run_parallel(lambda number: (number, threading.get_ident()), range(4)) == [
        (number, threading.get_ident()) for number in range(4)
    ]


def test_interrupts_wait_for_what_runs_however_many_come() -> None:
    """Each call that has begun comes to its end before the interrupt goes on."""
    release, begun, ended = threading.Event(), list[int](), list[int]()

    def call(number: int) -> None:
        try:
            begun.append(number)
            release.wait(60)
        finally:
            ended.append(number)

    def interrupt() -> None:
        while len(begun) < 2:
            time.sleep(0.01)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        release.set()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        run_parallel(call, range(10), most=2)
    assert release.is_set()
    interrupter.join()
    assert sorted(ended) == [0, 1]
