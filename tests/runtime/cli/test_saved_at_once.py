"""Pictures of a call are saved as each is finished, and little memory is a line: what only a process can show."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calotype.runtime.pictures.embedded import read_parameters

GENERATE = [sys.executable, "-m", "calotype", "generate", "red apple", "--steps", "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_finished_stays_when_a_call_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    command = [*GENERATE, "--images", "2000", "--seed", "5", "-o", str(tmp_path / "a.png")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "a-4.png").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert (process.returncode, errors.strip()) == (130, "calotype: interrupted")
    pictures = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    assert [path.name for path in pictures] == [f"a-{count}.png" for count in range(len(pictures))]
    for count, path in enumerate(pictures):
        assert f"Seed: {5 + count}," in read_parameters(path)


@pytest.mark.parametrize("mebibytes", [250, 400, 900])
def test_too_little_address_space_is_one_line(tmp_path: Path, mebibytes: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    command = [*GENERATE, "-o", str(tmp_path / "a.png")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("calotype: there is not enough memory")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
