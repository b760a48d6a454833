"""The process that serves: where it listens, how it ends, what SIGHUP changes."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.runtime.errors import BackendError, OutputError
from calotype.serving.config import ServeConfig
from calotype.serving.errors import NotReadyError
from calotype.serving.server import Server, listening
from calotype.serving.tasks import Task
from calotype.serving.workers.dispatcher import Dispatcher
from calotype.serving.workers.tickets import QueuedTicket
from tests.runtime.command_line import calotype
from tests.serving.running import FAULTY, TIMEOUT, request

TALBOT = '[models.talbot]\nbundle = "talbot"\nbackend = "cpu"\nwarm = ["64x64"]\n'
Scenario = Callable[[Dispatcher], Coroutine[Any, Any, Any]]


def serve(tmp_path: Path, scenario: Scenario, text: str = TALBOT) -> Any:
    """Serve in this process until the end of ``scenario``, which has to end the server; returns what it gives."""
    file, results = tmp_path / "serve.toml", []
    file.write_text(f"port = 0\nthreads = 1\n{text}")

    async def act(dispatcher: Dispatcher) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                results.append(await scenario(dispatcher))
        except BaseException:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    acting = []

    def announce(_: str) -> None:
        acting.append(asyncio.get_running_loop().create_task(act(server.dispatcher)))

    server = Server(lambda: ServeConfig.read(file, {}, {}), announce, command=FAULTY)
    server.run()
    acting[0].result()
    return results[0]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def submit(dispatcher: Dispatcher, prompt: str, steps: int) -> QueuedTicket:
    return dispatcher.submit([Task(id="a", model="talbot", request=request(prompt, num_inference_steps=steps))])[0]


def test_told_to_stop_it_is_not_ready_at_once_and_finishes_what_runs(tmp_path: Path) -> None:
    async def stop(dispatcher: Dispatcher) -> bool:
        await dispatcher.opened()
        ticket = submit(dispatcher, "slow", 4)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: dispatcher.stopping)
        assert not dispatcher.models["talbot"].ready
        assert not ticket.ended
        return (await ticket.drawn()).pixels.any()

    assert serve(tmp_path, stop)


def test_told_twice_it_does_not_wait(tmp_path: Path) -> None:
    async def stop(dispatcher: Dispatcher) -> Any:
        await dispatcher.opened()
        ticket = submit(dispatcher, "slow", 1000)
        await until(lambda: ticket.step > 0)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: dispatcher.stopping)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(NotReadyError, match="stopping"):
            await ticket.drawn()

    serve(tmp_path, stop)


def test_what_is_not_finished_in_time_is_dropped(tmp_path: Path) -> None:
    async def stop(dispatcher: Dispatcher) -> Any:
        await dispatcher.opened()
        ticket = submit(dispatcher, "slow", 1000)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(NotReadyError, match="stopping"):
            await ticket.drawn()

    serve(tmp_path, stop, f"stop_seconds = 0.2\n{TALBOT}")


def test_sighup_takes_the_configuration_anew_where_it_is_sound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "serve.toml"

    async def reload(dispatcher: Dispatcher) -> Any:
        await dispatcher.opened()
        file.write_text(f"port = 0\nthreads = 1\nmax_queue = 1\n{TALBOT}{TALBOT.replace('models.talbot', 'models.b')}")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "b" in dispatcher.models)
        assert dispatcher.models["talbot"].ready
        assert dispatcher.bounds.max_queue == 1
        await until(lambda: dispatcher.models["b"].ready)
        file.write_text("prot = 3")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "stays as it was" in caplog.text)
        assert list(dispatcher.models) == ["talbot", "b"]
        file.write_text(f"port = 0\nthreads = 1\n{TALBOT}")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "b" not in dispatcher.models)
        ticket = submit(dispatcher, "a red apple", 1)
        os.kill(os.getpid(), signal.SIGTERM)
        return (await ticket.drawn()).pixels.any()

    assert serve(tmp_path, reload)


def test_a_model_that_cannot_be_opened_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    async def nothing(dispatcher: Dispatcher) -> None:
        pass

    with pytest.raises(BackendError, match=r"talbot cannot be opened: .*(driver|GPU|installed|build)"):
        serve(tmp_path, nothing, TALBOT.replace('"cpu"', '"tensorrt-rtx"'))


def test_what_cannot_be_built_is_said_in_its_own_line(tmp_path: Path) -> None:
    async def nothing(dispatcher: Dispatcher) -> None:
        pass

    with pytest.raises(BackendError, match="talbot cannot be built: calotype: tensorrt is not installed"):
        serve(tmp_path, nothing, "build = true\n" + TALBOT.replace('"cpu"', '"tensorrt"'))


@pytest.mark.slow
def test_engines_are_built_before_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))

    async def wait(dispatcher: Dispatcher) -> str:
        await until(lambda: dispatcher.models["talbot"].why != "it is being opened")
        said = dispatcher.models["talbot"].why
        await until(lambda: dispatcher.models["talbot"].ready)
        os.kill(os.getpid(), signal.SIGTERM)
        return said

    assert serve(tmp_path, wait, f"build = true\n{TALBOT}") == "its engines are being built"
    assert list((tmp_path / "cache").rglob("*.cpu.*"))


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = ServeConfig.read(None, {"talbot": "talbot"}, {"port": other.getsockname()[1]})
        said = "cannot be listened at: Address already in use; give another --host"
        with pytest.raises(OutputError, match=said), listening(config):
            pass
    path = tmp_path / "calotype.sock"
    config = ServeConfig.read(None, {"talbot": "talbot"}, {"uds": path})
    with listening(config) as (_, where):
        assert where == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(OutputError, match="another server listens there; give another --uds"), listening(config):
            pass
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with listening(config):  # nobody listens at it any more
        pass


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "calotype", "serve", "talbot", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            yield started, int(started.stdout.readline().rpartition(":")[2])
        finally:
            started.kill()


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_command_serves_and_an_interrupt_ends_it_with_0(process: tuple[subprocess.Popen[str], int]) -> None:
    started, port = process
    assert get(port, "/livez")[0] == 200
    end = time.monotonic() + TIMEOUT
    while get(port, "/readyz")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=TIMEOUT)
    assert started.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model to serve"),
        (["talbot", "--host", "0.0.0.0"], "there are no keys; give --api-key-file"),
        (["talbot", "--host", "127.0.0.1", "--uds", "x"], "--host and --uds exclude each other"),
        (["talbot", "--devices", "a"], "no whole number"),
        (["talbot", "--config", "nix.toml"], "nix.toml does not exist"),
        (["nix"], "there is no bundle 'nix'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], said: str) -> None:
    refused = calotype("serve", *arguments)
    assert refused.returncode in (1, 2)
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_missing_package_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "calotype.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = calotype("serve", "talbot")
    assert refused.returncode == 1
    assert "uvicorn is not installed; install it with: " in refused.stderr
