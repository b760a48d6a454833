"""What doctor says of machines with and without a GPU; CUDA is a stand-in where one is needed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from calotype.runtime.diagnostics import doctor
from calotype.runtime.diagnostics.doctor import examine, machine
from calotype.runtime.errors import install_line
from tests.runtime.cuda_standin import Cuda, Status


def finding(backend: str) -> doctor.Finding:
    return next(item for item in examine() if item.backend == backend)


def test_a_gpu_makes_what_is_installed_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Cuda())  # type: ignore[arg-type]
    assert machine()["gpu"] == "Stand-in sm89, 1 GiB, CUDA 13000"
    rtx = finding("tensorrt-rtx")
    assert (rtx.usable, rtx.version, rtx.advice) == (True, importlib.metadata.version("tensorrt-rtx"), "")


def test_without_a_driver_each_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.status, cuda.driver = Status.cudaErrorInsufficientDriver, 0
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)  # type: ignore[arg-type]
    assert machine()["gpu"].startswith("none: there is no NVIDIA driver")
    assert not finding("tensorrt-rtx").usable
    assert finding("tensorrt-rtx").advice.startswith("there is no NVIDIA driver")
    assert finding("cpu").usable


def test_what_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "tensorrt", {"no-such-distribution": "none"})
    assert finding("tensorrt").advice == install_line("tensorrt")


def test_the_command_prints_it() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "calotype.runtime", "doctor"], capture_output=True, text=True, timeout=600, check=True
    )
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert lines["cpu"].strip().startswith("ready (")
    assert {
        "system",
        "processor",
        "cores",
        "memory",
        "python",
        "gpu",
        "cuda",
        "tensorrt",
        "tensorrt-rtx",
    } <= lines.keys()
