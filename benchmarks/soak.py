"""A server under mixed traffic for long: what fails, and whether memory, threads or descriptors grow.

A fifth of the requests are given up by their clients, and one in twenty is a fault: nonsense, or half a body.
With ``--leak`` the server keeps so many bytes of every picture, which the figures have to show: a control.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import model
from benchmarks.environments import WORK
from benchmarks.machine import machine, origin, results, write
from benchmarks.serving.servers import memory, processes, running

CANCELLED, FAULTY = 0.20, 0.05
SETTLING = 0.25  # of the time, which is not looked at: pools, caches and tables fill
EVERY = 2.0  # seconds between two looks
MIX: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 4},
    {"num_inference_steps": 8, "scheduler": "euler"},
    {"num_inference_steps": 4, "n": 2},
    {"num_inference_steps": 4, "size": "64x64"},
    {"num_inference_steps": 6, "guidance_scale": 1.0, "output_format": "jpeg"},
    {"num_inference_steps": 6, "stream": True, "partial_images": 2},
)
FAULTS: tuple[bytes, ...] = (b"", b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "size": "0x0"}', b"\xff" * 4096)
# Python imports a module of this name when it starts, in the server's every process.
LEAK = """
import calotype.runtime.pipeline as pipeline
kept, drawn = [], pipeline.Pipeline.finish_all
def leaking(*given, **named):
    kept.append(bytearray(b"x" * {size}))
    return drawn(*given, **named)
pipeline.Pipeline.finish_all = leaking
"""


class Traffic:
    """Requests at a steady rate, counted by what came of them."""

    def __init__(self, url: str, rate: float, seed: int) -> None:
        self._place, self._rate = urllib.parse.urlsplit(url), rate
        self._random, self.outcomes = random.Random(seed), Counter[str]()
        self._lock = threading.Lock()

    def send(self, seconds: float) -> None:
        """Send for so long, and wait for what is under way."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(64) as pool:
            for number in itertools.count():
                if time.monotonic() >= end:
                    break
                body = {"prompt": "a red apple, noto style", "seed": number, **self._random.choice(MIX)}
                kind, wait = self._random.random(), self._random.random()
                if kind < FAULTY:
                    pool.submit(self._counted, self._fault, self._random.choice(FAULTS), wait)
                elif kind < FAULTY + CANCELLED:
                    pool.submit(self._counted, self._give_up, body, wait)
                else:
                    pool.submit(self._counted, self._ask, body)
                time.sleep(self._random.expovariate(self._rate))

    def _counted(self, send: Any, *given: Any) -> None:
        try:
            outcome = send(*given)
        except (OSError, http.client.HTTPException) as error:
            outcome = f"no answer: {type(error).__name__}"
        with self._lock:
            self.outcomes[outcome] += 1

    def _ask(self, body: dict[str, Any]) -> str:
        with contextlib.closing(self._connection()) as connection:
            connection.request("POST", PATH, json.dumps(body), JSON)
            answer = connection.getresponse()
            data = answer.read()
            whole = b'"b64_json"' in data and (not body.get("stream") or b".completed" in data)
            return "drawn" if answer.status == 200 and whole else f"refused with {answer.status}"

    def _give_up(self, body: dict[str, Any], wait: float) -> str:
        with contextlib.closing(self._connection()) as connection:
            connection.request("POST", PATH, json.dumps(body), JSON)
            time.sleep(wait / 2)
            return "given up"

    def _fault(self, data: bytes, wait: float) -> str:
        with contextlib.closing(self._connection()) as connection:
            if wait < 0.5:
                connection.request("POST", PATH, data, JSON)
                return f"fault answered with {connection.getresponse().status}"
            connection.putrequest("POST", PATH)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(data[:10])
            time.sleep(wait)
            return "fault: half a body"

    def _connection(self) -> http.client.HTTPConnection:
        assert self._place.hostname is not None
        return http.client.HTTPConnection(self._place.hostname, self._place.port, timeout=120)


PATH, JSON = "/v1/images/generations", {"Content-Type": "application/json"}


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Percent an hour by which a value grows: the median of the slopes of pairs (Theil and Sen), over the median."""
    pairs = [
        (b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(samples[:: max(1, len(samples) // 200)], 2)
    ]
    return 100 * 3600 * statistics.median(pairs) / statistics.median(value for _, value in samples)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--leak", type=int, default=0, help="bytes that the server keeps of every call, as a control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--write", action="store_true", help="write the figures into results/, too")
    options = parser.parse_args(arguments)
    options.work.mkdir(exist_ok=True)
    seconds = options.minutes * 60
    looks: list[tuple[float, float, int]] = []
    stop = threading.Event()

    def watch(pid: int) -> None:
        begin = time.monotonic()
        while not stop.wait(EVERY):
            looks.append((time.monotonic() - begin, memory(pid), _descriptors(pid)))

    with contextlib.ExitStack() as stack:
        if options.leak:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            (Path(folder) / "sitecustomize.py").write_text(LEAK.format(size=options.leak))
            os.environ["PYTHONPATH"] = folder
        subject = model("talbot", options.work)
        url, pid = stack.enter_context(running("steps", subject, subject.size, options.work))
        watcher = threading.Thread(target=watch, args=(pid,))
        watcher.start()
        traffic = Traffic(url, options.rate, options.seed)
        try:
            traffic.send(seconds)
        finally:
            stop.set()
            watcher.join()
        alive = _alive(url)
    settled = [look for look in looks if look[0] >= SETTLING * seconds]
    report = {
        **origin(
            f"python -m benchmarks.soak --minutes {options.minutes:g} --rate {options.rate:g} --leak {options.leak}"
        ),
        "machine": machine(),
        "outcomes": dict(sorted(traffic.outcomes.items())),
        "ready_at_the_end": alive,
        "memory_mb": {"first": round(settled[0][1], 1), "last": round(settled[-1][1], 1)},
        "memory_percent_an_hour": round(slope([(at, used) for at, used, _ in settled]), 2),
        "descriptors": {"first": settled[0][2], "last": settled[-1][2]},
    }
    print(json.dumps(report, indent=2))
    if options.write:
        write(results("soak-leak" if options.leak else "soak"), report)


def _alive(url: str) -> bool:
    place = urllib.parse.urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(b"GET /readyz HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        return b" 200 " in connection.recv(100)


def _descriptors(pid: int) -> int:
    """Open files of a server's processes."""
    total = 0
    for folder in processes(pid):
        with contextlib.suppress(OSError):
            total += len(list((folder / "fd").iterdir()))
    return total


if __name__ == "__main__":
    main()
