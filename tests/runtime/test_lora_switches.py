"""Sets of LoRAs that are switched at random, among failures and killed processes; nothing is left of any."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from calotype.engine.cpu import build_engines
from calotype.runtime.adapters.merging import Merged
from calotype.runtime.bundle.folder import BUNDLED, Bundle
from calotype.runtime.errors import BackendError, CalotypeError
from calotype.runtime.networks import Networks
from calotype.runtime.pipeline import Pipeline
from tests.runtime.lora_files import TEXT, UNET, write_lora
from tests.runtime.lora_switching import MEMORY, SETS, TALBOT, digest, drawn, write_loras

ROOT = Path(__file__).parents[2]


class EndError(BaseException):
    """Ends what runs, and is caught by nothing but the test."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines of what LoRAs change; the folder that they lie in."""
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    build_engines(Bundle.open(TALBOT), networks=[UNET, TEXT])
    return tmp_path / "cache"


def fail(error: BaseException) -> Any:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def failures(folder: Path, tmp_path: Path) -> list[tuple[str, Any]]:
    """What fails, and how."""
    misfit, cut = tmp_path / "misfit.safetensors", tmp_path / "cut.safetensors"
    save_file({"unet.no.lora_A.weight": np.ones((1, 1), np.float32)}, misfit)
    cut.write_bytes((folder / "style.safetensors").read_bytes()[:-9])
    huge = write_lora(tmp_path / "huge.safetensors", 9, strength=1e9)
    return [
        *(("file", path) for path in (misfit, cut, huge, folder / "notes.txt", tmp_path / "none.safetensors")),
        *(("opening", BackendError("no memory")), ("opening", EndError()), ("merging", KeyboardInterrupt())),
        ("running", EndError()),
    ]


class Switching:
    """Draws with sets of LoRAs at random, and has things fail in between."""

    def __init__(self, pipeline: Pipeline, folder: Path, seed: int) -> None:
        self.pipeline, self.folder, self.rng = pipeline, folder, random.Random(seed)
        self.wanted: dict[Any, bytes] = {}
        self.kills = 0

    def switch(self) -> None:
        """Draw with a set, then with none; each gives what it gave before."""
        loras = self.rng.choice(SETS)
        if self.rng.random() < 0.3:
            self.pipeline.set_loras(loras)
            got = drawn(self.pipeline, None)
            self.pipeline.set_loras([])
        else:
            got = drawn(self.pipeline, loras)
        assert self.wanted.setdefault(loras, got) == got, loras
        base = drawn(self.pipeline, None)
        assert self.wanted.setdefault((), base) == base

    def fail(self, kind: str, what: Any) -> None:
        """Have something of a kind fail."""
        given = [what] if kind == "file" else [("style", self.rng.random())]
        with pytest.MonkeyPatch.context() as patch:
            if kind == "opening":
                patch.setattr(Networks, "_open", fail(what))
            elif kind == "merging":
                patch.setattr(Merged, "single", fail(what))
            elif kind == "running":
                patch.setattr("calotype.runtime.denoising.denoiser._fill", fail(what))
            with pytest.raises((CalotypeError, EndError, KeyboardInterrupt)):
                if self.rng.random() < 0.5 and kind != "running":
                    self.pipeline.set_loras(given)
                else:
                    drawn(self.pipeline, given)

    def kill(self) -> None:
        """Kill another process at any moment while it switches; all that it drew until then is what is drawn here."""
        self.kills += 1
        command = [sys.executable, "-m", "tests.runtime.lora_switching", str(self.folder), str(self.kills)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]  # the model's own, whatever was killed before
            time.sleep(self.rng.random())
            process.kill()
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        for number, seen in (line.split() for line in lines if line.endswith("\n")):
            loras = SETS[int(number)]
            assert digest(self.wanted.setdefault(loras, drawn(self.pipeline, loras))) == seen, loras


def files(*folders: Path) -> dict[Path, str]:
    """Every file below, and its hash."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def check_switches(folder: Path, tmp_path: Path, times: int, *others: Path) -> Mapping[Any, bytes]:
    """So many switches among failures, and processes that are killed; returns what each set gave, every time."""
    failing, watched = failures(folder, tmp_path), (folder, BUNDLED / TALBOT, *others)
    before = files(*watched)
    with Pipeline.load(TALBOT, "cpu", lora_folder=folder, lora_memory=MEMORY) as pipeline:
        switching = Switching(pipeline, folder, 0)
        for number in range(times):
            if switching.rng.random() < 0.4:
                switching.fail(*switching.rng.choice(failing))
            switching.switch()
            if number % 20 == 9:
                switching.kill()
                switching.switch()
    assert files(*watched) == before
    with Pipeline.load(TALBOT, "cpu") as fresh:
        assert drawn(fresh, None) == switching.wanted[()]
    assert len(set(switching.wanted.values())) == len(switching.wanted) > 1
    return switching.wanted


def test_switches_and_failures_leave_no_trace(folder: Path, tmp_path: Path) -> None:
    check_switches(folder, tmp_path, 10)


@pytest.mark.slow
def test_two_hundred_switches_and_failures_leave_no_trace(folder: Path, tmp_path: Path) -> None:
    assert len(check_switches(folder, tmp_path, 200)) == len(SETS)


@pytest.mark.slow
def test_two_hundred_leave_no_trace_with_engines(folder: Path, tmp_path: Path, engines: Path) -> None:
    assert len(check_switches(folder, tmp_path, 200, engines)) == len(SETS)
