"""Workers that die, hang, or cannot start: who is touched, what is drawn again, what the server says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.runtime.pipeline import Pipeline
from calotype.serving.errors import NotReadyError, WorkerDiedError
from calotype.serving.workers.admission import Bounds
from tests.serving.running import FAULTY, SIZE, Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(command=FAULTY, bounds=Bounds(hang_seconds=3.0)) as started:
        yield started


@pytest.fixture(scope="module")
def wanted() -> list[bytes]:
    with Pipeline.load("talbot", "cpu", threads=1) as pipeline:
        draw = {"width": SIZE, "height": SIZE, "num_inference_steps": 3}
        return [pipeline("cat face", seed=seed, **draw).images[0].tobytes() for seed in range(4)]


def restarts(server: Running) -> int:
    return int(server.dispatcher.snapshot()["workers"][0]["restarts"])


def test_what_a_killed_worker_had_is_drawn_again_with_the_same_bytes(
    server: Running, wanted: list[bytes], tmp_path: Path
) -> None:
    async def draw() -> list[Any]:
        before = restarts(server)
        tasks = [server.task("cat face", seed=seed) for seed in range(4)]
        tickets = server.dispatcher.submit([server.task(f"once {tmp_path}/died"), *tasks])
        found = [await server.outcome(ticket) for ticket in tickets]
        assert restarts(server) == before + 1
        return found

    suspect, *others = server.run(draw())
    assert isinstance(suspect, bytes)
    assert others == wanted


@pytest.mark.parametrize("fault", ["kill", "segfault"])
def test_a_task_that_kills_two_workers_fails_and_no_other_does(
    server: Running, wanted: list[bytes], fault: str
) -> None:
    async def draw() -> list[Any]:
        before = restarts(server)
        tasks = [server.task("cat face", seed=seed) for seed in range(4)]
        tickets = server.dispatcher.submit([*tasks[:2], server.task(fault), *tasks[2:]])
        found = [await server.outcome(ticket) for ticket in tickets]
        assert restarts(server) == before + 2
        return found

    found = server.run(draw())
    poison = found.pop(2)
    assert isinstance(poison, WorkerDiedError)
    assert found == wanted


def test_a_death_is_noticed_at_once_and_the_worker_is_back(server: Running) -> None:
    async def kill() -> None:
        before, pid = restarts(server), server.dispatcher.snapshot()["workers"][0]["pid"]
        assert server.dispatcher.models["talbot"].ready
        os.kill(pid, signal.SIGKILL)
        await server.until(lambda: not server.dispatcher.models["talbot"].ready)
        assert "signal 9" in server.dispatcher.models["talbot"].why
        await server.until(lambda: server.dispatcher.models["talbot"].ready)
        assert restarts(server) == before + 1
        assert isinstance(await server.outcome(server.dispatcher.submit([server.task()])[0]), bytes)

    server.run(kill())


def test_a_worker_that_is_stopped_hangs_and_is_replaced(server: Running, wanted: list[bytes]) -> None:
    async def stop() -> list[Any]:
        before, pid = restarts(server), server.dispatcher.snapshot()["workers"][0]["pid"]
        os.kill(pid, signal.SIGSTOP)
        tickets = server.dispatcher.submit([server.task("cat face", seed=seed) for seed in range(4)])
        found = [await server.outcome(ticket) for ticket in tickets]
        assert restarts(server) == before + 1
        assert "hung" in server.dispatcher.snapshot()["workers"][0]["error"]
        return found

    assert server.run(stop()) == wanted


def test_a_task_that_hangs_two_workers_fails(server: Running) -> None:
    async def draw() -> Any:
        return await server.outcome(server.dispatcher.submit([server.task("hang")])[0])

    assert isinstance(server.run(draw()), WorkerDiedError)


def test_a_worker_that_cannot_start_leaves_the_server_up_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_TEST_BROKEN", "1")
    with running(command=FAULTY, wait=False) as started:

        async def look() -> None:
            await started.until(lambda: "3 times in a row" in started.dispatcher.models["talbot"].why)
            state = started.dispatcher.models["talbot"]
            assert not state.ready
            assert "cannot open faulty_worker.py" in state.why
            with pytest.raises(NotReadyError, match="times in a row"):
                started.dispatcher.submit([started.task()])
            monkeypatch.delenv("CALOTYPE_TEST_BROKEN")
            await started.until(lambda: started.dispatcher.models["talbot"].ready)

        started.run(look())


def test_a_worker_ends_with_the_process_that_serves() -> None:
    """Also where that is killed, and can say nothing."""
    script = (
        "import asyncio, sys, time\n"
        "from tests.serving.running import running, talbot\n"
        "with running() as started:\n"
        "    print(started.dispatcher.snapshot()['workers'][0]['pid'], flush=True)\n"
        "    time.sleep(100)\n"
    )

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            worker = int(process.stdout.readline())
        finally:
            process.kill()
    end = time.monotonic() + 60
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nothing_is_left_behind() -> None:
    """Processes, threads and descriptors, after deaths, cancels and the end."""
    before = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    with running(command=FAULTY) as started:

        async def use() -> int:
            tickets = started.dispatcher.submit([started.task("kill"), started.task(), started.task()])
            tickets[2].cancel()
            await asyncio.gather(*map(started.outcome, tickets))
            pid = started.dispatcher.snapshot()["workers"][0]["pid"]
            assert isinstance(pid, int)
            return pid

        pid = started.run(use())
    assert not Path(f"/proc/{pid}").exists()
    assert (set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))) == before
