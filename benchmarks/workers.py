"""A peer's process, seen from the harness: requests, answers, memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environments import ROOT
from benchmarks.peers.protocol import Task
from calotype.runtime.closing import Closing

SAMPLING = 0.02  # seconds between two looks at a process's memory


class PeerError(Exception):
    """A peer could not do what it was asked for; the message is its own."""


class Worker(Closing):
    """``python -m module`` in the environment of ``interpreter``, ready to be spoken to.

    Attributes:
        peak: the most bytes seen at once: ``resident``, of which ``anonymous`` are not pages of a file.
    """

    def __init__(self, interpreter: Path, module: str, variables: Mapping[str, str] | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
        self.started = time.perf_counter()
        self._log = (interpreter.parent.parent / f"{module.rpartition('.')[2]}.log").open("w+")
        self._process = subprocess.Popen(
            [interpreter, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.peak = {"resident": 0, "anonymous": 0}
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def load(self, model: Path, mode: str) -> dict[str, Any]:
        """Seconds of ``import`` and ``load``, and ``versions``."""
        return self._ask({"load": {"model": str(model), "mode": mode}})

    def generate(self, task: Task) -> dict[str, Any]:
        """``seconds`` of the call, ``steps`` and ``stages``."""
        return self._ask({"generate": dataclasses.asdict(task)})

    def close(self) -> None:
        """End the process."""
        self._ended.set()
        self._watcher.join()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the process ended with code {self._process.wait()}; its last words: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "none"

    def _watch(self) -> None:
        path = Path(f"/proc/{self._process.pid}/status")
        while not self._ended.wait(SAMPLING):
            try:
                values = dict(line.split(":", 1) for line in path.read_text().splitlines())
                resident, anonymous = (int(values[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
            except (OSError, KeyError, ValueError):  # no such system, or the process has ended
                return
            self.peak = {
                "resident": max(self.peak["resident"], resident),
                "anonymous": max(self.peak["anonymous"], anonymous),
            }
