"""The one logger that all sessions and builds of a process share, on TensorRT-RTX's real base class."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from calotype.runtime.errors import BackendError
from calotype.runtime.sessions.cuda import Gpu
from calotype.runtime.sessions.libraries import load_library


@pytest.fixture
def logger() -> Any:
    return load_library("tensorrt-rtx").logger


def error(logger: Any, text: str) -> None:
    logger.log(type(logger).__base__.Severity.ERROR, text)


def note(logger: Any, text: str) -> None:
    logger.log(type(logger).__base__.Severity.INFO, text)


def elsewhere(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_the_first_error_after_a_mark_in_one_line(logger: Any) -> None:
    error(logger, "from long before")
    mark = logger.mark()
    assert logger.first(mark) == "it gives no reason"
    note(logger, "not of interest")
    error(logger, "no kernel\n  for this")
    error(logger, "so the build failed")
    assert logger.first(mark) == "no kernel for this"
    assert logger.first(logger.mark()) == "it gives no reason"


def test_another_who_begins_or_fails_takes_nobodys_reason_away(logger: Any) -> None:
    mark = logger.mark()
    elsewhere(lambda: error(logger, "of another"))
    error(logger, "of this one")
    elsewhere(lambda: error(logger, f"of a third, from mark {logger.mark()}"))
    assert logger.first(mark) == "of this one"


def test_a_thread_of_the_librarys_own_is_heard_too(logger: Any) -> None:
    mark = logger.mark()
    elsewhere(lambda: error(logger, "in a worker"))
    assert logger.first(mark) == "in a worker"


def test_memory_is_that_of_the_build_that_asks(logger: Any) -> None:
    mark = logger.mark()
    note(logger, "Total Weights Memory: 100 bytes")
    elsewhere(lambda: note(logger, "Total Weights Memory: 7 bytes"))
    note(logger, "Total Activation Memory: 20 bytes")
    note(logger, "Total time: 3 s")
    assert logger.memory(mark) == {"Weights Memory": 100, "Activation Memory": 20}
    assert logger.memory(logger.mark()) == {}


def test_tensorrt_rtx_says_itself_which_gpus_it_runs_on() -> None:
    library = load_library("tensorrt-rtx")
    ada = Gpu(name="NVIDIA L40S", capability="sm89", driver="13000", memory=48 << 30)
    library.check_gpu(ada)
    with pytest.raises(BackendError, match="does not run on NVIDIA H100 sm90"):
        library.check_gpu(Gpu(name="NVIDIA H100", capability="sm90", driver="13000", memory=80 << 30))
