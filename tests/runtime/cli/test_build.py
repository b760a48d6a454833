"""``calotype build`` and ``calotype info PLAN``: real builds by TensorRT-RTX, stopped and raced in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.command_line import calotype

CALOTYPE = [sys.executable, "-m", "calotype.runtime"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def build(bundle: Path, *arguments: str) -> list[str]:
    return ["build", str(bundle), "--backend", "tensorrt-rtx", *arguments]


def test_a_plan_from_the_build_to_the_cleaning(tiny_bundle: Path, folder: Path) -> None:
    command = build(tiny_bundle, "--network", "vae_decoder", "--static", "--profile", "wide,width=64")
    result = calotype(*command)
    assert result.returncode == 0, result.stderr
    plan = Path(result.stdout.strip())
    assert plan.parent == folder
    lines = result.stderr.splitlines()
    assert lines[0].startswith("vae_decoder: float")
    assert "activations about" in lines[0]
    assert lines[1].startswith("disk: about")
    assert lines[2].startswith("time: not known")
    assert lines[3].endswith("not built before")

    info = calotype("info", plan)
    assert (info.returncode, info.stderr) == (0, "")
    for text in (
        "network:    vae_decoder of tiny",
        "profile:    wide: batch 2:2:2, ",
        "64:64:64",
        "output:     image ",
    ):
        assert text in info.stdout
    record = json.loads(calotype("info", plan, "--json").stdout)
    assert record["figures"]["weights"] > 0
    assert record["key"]["gpu"] == "portable"

    stated = calotype("info", tiny_bundle).stdout
    activations = f"{record['figures']['activations'] / 2**20:.1f} MiB"
    assert f", activations {activations} in the largest plan here\n" in stated
    assert "with --low-memory, " in stated
    assert "the activations of text_encoder, unet, vae_encoder, which their plans state" in stated

    assert calotype("build", "--list").stdout.startswith(f"{plan}  ")
    again = calotype(*command)
    assert "time: none, all plans are there" in again.stderr
    assert "taken from the cache" in again.stderr
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    assert "its sha256 is not the recorded one" in calotype("build", "--list").stdout
    refused = calotype("info", plan)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "build it again with: calotype build" in refused.stderr
    mended = calotype(*command)
    assert "built again, since its sha256 is not the recorded one" in mended.stderr
    changed = calotype(*build(tiny_bundle, "--network", "vae_decoder"))
    assert "by the largest plan here" in changed.stderr
    assert "built again, since these changed: profiles" in changed.stderr

    assert calotype("build", "--clean").stdout.endswith("MiB freed\n")
    assert not list(folder.iterdir())


def test_an_engine_for_this_processor(tiny_bundle: Path, folder: Path) -> None:
    command = ["build", str(tiny_bundle), "--backend", "cpu", "--network", "vae_decoder"]
    result = calotype(*command)
    assert result.returncode == 0, result.stderr
    plan = Path(result.stdout.strip())
    assert plan.parent == folder
    assert result.stderr.splitlines()[-1].endswith("not built before")
    info = calotype("info", plan)
    assert (info.returncode, info.stderr) == (0, "")
    for text in ("network:    vae_decoder of tiny, float32", "built by:   ONNX Runtime", "parity:     relative error"):
        assert text in info.stdout
    assert json.loads(calotype("info", plan, "--json").stdout)["weights"]["size"] > 0
    assert "float32, for " in calotype("build", "--list").stdout
    weights = plan.with_name(plan.name + ".weights")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    times = weights.stat()
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk would
    assert "is not the file that it was built with" in calotype("build", "--list").stdout
    assert calotype("info", plan).returncode == 1
    assert calotype("build", "--clean").stdout.endswith("MiB freed\n")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "BUNDLE and --backend are needed"),
        (["talbot"], 2, "BUNDLE and --backend are needed"),
        (["talbot", "--backend", "tvm"], 2, "'tvm' is not one of 'tensorrt', 'tensorrt-rtx'"),
        (["nothing", "--backend", "tensorrt-rtx"], 1, "there is no bundle 'nothing'"),
        (["talbot", "--backend", "tensorrt-rtx", "--batch", "1:2"], 2, "the range '1:2' cannot be read"),
        (["talbot", "--backend", "tensorrt-rtx", "--height", "60"], 2, "height=60 is not a multiple of 8"),
        (["talbot", "--backend", "tensorrt-rtx", "--profile", "default,height=64"], 2, "two profiles are named"),
        (["talbot", "--backend", "tensorrt-rtx", "--network", "unett"], 2, "no network 'unett'"),
        (["talbot", "--backend", "cpu", "--network", "unett"], 2, "no network 'unett'"),
        (["talbot", "--backend", "cpu", "--height", "64"], 2, "--height is for plans of a GPU"),
        (["talbot", "--backend", "cpu", "--static"], 2, "--static is for plans of a GPU"),
        (["talbot", "--backend", "tensorrt-rtx", "--version-compatible"], 2, "leave --version-compatible out"),
        (["talbot", "--backend", "tensorrt-rtx", "--strip-weights"], 1, "building without weights needs a GPU"),
    ],
)
def test_bad_input(folder: Path, arguments: list[str], code: int, message: str) -> None:
    result = calotype("build", *arguments)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(folder.glob("*.plan"))


def _started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """The process, once it holds the lock and so is about to build."""
    process = subprocess.Popen([*CALOTYPE, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        if list(folder.glob("*.lock")):
            return process
        time.sleep(0.05)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_builder_stopped_half_way_leaves_nothing_that_looks_whole(
    folder: Path, number: signal.Signals, code: int
) -> None:
    process = _started(["build", "talbot", "--backend", "tensorrt-rtx", "--network", "unet"], folder)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not list(folder.glob("*.plan"))
    assert calotype("build", "--list").stdout == ""


def test_two_builders_at_once_build_once(tiny_bundle: Path, folder: Path) -> None:
    command = build(tiny_bundle, "--network", "unet")
    first = _started(command, folder)
    second = calotype(*command)
    output, errors = first.communicate(timeout=600)
    assert first.returncode == 0, errors
    assert second.stdout == output
    assert "not built before" in errors
    assert "taken from the cache" in second.stderr
    assert len(list(folder.glob("*.plan"))) == 1
