"""The servers that are measured, each a process of its own that listens on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import environments
from benchmarks.checkpoints import Model

# Python imports a module of this name when it starts, in the server's every process.
POLICY = """
import calotype.serving.workers.batcher as batcher
from benchmarks.serving.policies import {policy}
batcher.Batcher = {policy}
"""
OPENING = 300.0  # seconds that a server may take until it answers
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to serve a model.

    Attributes:
        title: as people know it.
        policy: the class in ``policies.py`` that takes the place of our batcher; "" is our own.
        program: a peer's, in this folder; "" is ``calotype serve``.
    """

    title: str
    policy: str = ""
    program: str = ""


SERVERS = {
    "steps": Kind(title="calotype serve: requests share steps"),
    "requests": Kind(title="calotype serve, whole requests in a batch", policy="Requests"),
    "alone": Kind(title="calotype serve, one request at a time", policy="Alone"),
    "litserve": Kind(title="LitServe with batching over diffusers", program="litserve_peer.py"),
    "fastapi": Kind(title="FastAPI over a locked diffusers pipeline", program="fastapi_peer.py"),
}


@contextlib.contextmanager
def running(name: str, model: Model, size: int, work: Path) -> Iterator[tuple[str, int]]:
    """Start a server; its address and the id of its process. It is stopped at the end, with all that it started."""
    kind, port = SERVERS[name], _free_port()
    variables = dict(os.environ)
    if kind.program:
        interpreter = environments.python("litserve", work)
        command = [str(interpreter), str(HERE / kind.program), str(model.checkpoint), str(size), str(port)]
    else:
        command = [sys.executable, "-m", "calotype", "serve", f"model={model.bundle}", "--port", str(port)]
        command += ["--max-queue", "100000", "--max-seconds", "100000"]
    if kind.policy:
        folder = work / f"policy-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(POLICY.format(policy=kind.policy))
        variables["PYTHONPATH"] = os.pathsep.join([str(folder), str(HERE.parent.parent)])
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=variables)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            yield url, process.pid
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            subprocess.run(["pkill", "-KILL", "-g", str(process.pid)], check=False)  # workers end without their parent
            process.wait()


def processes(pid: int) -> list[Path]:
    """The folders below /proc of a server's process and of all that it started, whose sessions are their own."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(status.parent.name)] = int(_value(status, "PPid"))
    return [Path(f"/proc/{own}") for own in parents if pid in _line(own, parents)]


def memory(pid: int) -> float:
    """MB that a server's processes hold and that are not pages of files."""
    total = 0
    for folder in processes(pid):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            total += int(_value(folder / "status", "RssAnon"))
    return total * 1024 / 1e6


def _value(status: Path, name: str) -> str:
    """The first word of a line of /proc/…/status; raises ValueError where there is no such line."""
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split()[1]
    raise ValueError(f"{status} has no {name}")


def _line(own: int, parents: Mapping[int, int]) -> list[int]:
    """A process and those that it descends from, as far as they are known."""
    found = [own]
    while (parent := parents.get(found[-1])) is not None:
        found.append(parent)
    return found


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + OPENING
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}; its log lies in the work folder")
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} does not answer after {OPENING:g} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
