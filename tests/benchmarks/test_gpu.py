"""The measuring that a GPU run does, without one: what is written, and what a failure or the end of the time costs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_diffusers, gpu_parts
from benchmarks.gpu_diffusers import DiffusersParts
from benchmarks.gpu_parts import PyTorchParts, measure
from benchmarks.subject import NotRunError, Subject
from calotype.runtime.bundle.folder import Bundle

PARTS = ["ready", "parity", "picture_parity", "stages_ms", "unet_rows_ms", "pictures", "images_in_a_call"]
PARTS += ["low_memory"]
OVER_STANDINS = """
import json, sys
from pathlib import Path
from tests.computing_standins import install
install()
from benchmarks import gpu_parts
from benchmarks.subject import Subject
subject = Subject(model="talbot", backend=sys.argv[1], work=Path("unused"), rounds=1, steps=1, images=(1,), repeats=1)
found = {}
gpu_parts.measure(subject, lambda part, value=None: found.update({part: value}))
print(json.dumps(found))
"""


def subject(backend: str = "cpu", **settings: Any) -> Subject:
    return Subject(model="talbot", backend=backend, work=Path("unused"), rounds=1, **settings)


def numbers(value: Any) -> Iterator[float]:
    """All, however deep."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def check(record: dict[str, Any], *, on_gpu: bool) -> None:
    """That every part has figures."""
    assert [part for part in record if part not in ("commit", "warnings")] == PARTS
    assert "failed" not in json.dumps(record)
    assert record["ready"]["pixels"] == Bundle.open("talbot").manifest.defaults.height
    assert all(math.isfinite(number) for number in numbers(record))
    assert {"text_encoder", "unet", "vae_decoder", "vae_encoder"} == record["stages_ms"].keys()
    assert len(record["parity"]) >= 5
    assert all(value["min_cosine"] > 0.999 for value in record["parity"].values() if isinstance(value, dict))
    memory = [record[part]["gpu_memory_mib"] for part in ("pictures", "low_memory")]
    assert all(size > 0 for size in memory) if on_gpu else memory == [None, None]
    assert record["pictures"]["host_us_per_step"] > 0
    parity = record["picture_parity"]
    assert parity["psnr_db"] is None or parity["psnr_db"] > 35
    assert (parity["repeats_equal"] == parity["repeats"]) == (parity["repeat_psnr_db"] is None)


def test_the_whole_path_on_the_cpu_and_a_later_call_that_adds_to_it(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    arguments = [
        "talbot",
        "--backend",
        "cpu",
        "--rounds",
        "1",
        "--images",
        "1",
        "--repeats",
        "1",
        "--output",
        str(path),
    ]
    gpu.main([*arguments, "--steps", "1", "--budget", "600"])
    report = json.loads(path.read_text())
    assert report["gpu"] == {"name": "cpu"}
    assert report["command"].startswith("python -m benchmarks.gpu talbot --backend cpu")
    assert report["versions"]["numpy"]
    check(report["models"]["talbot"]["cpu"], on_gpu=False)
    gpu.main(["sd1", *arguments, "--budget", "0"])
    later = json.loads(path.read_text())["models"]
    assert later["talbot"] == report["models"]["talbot"]
    assert later["sd1"]["cpu"]["not_run"] == "the budget was spent before it began"
    gpu.main([*arguments, "--part", "stages_ms"])
    alone = json.loads(path.read_text())["models"]["talbot"]["cpu"]
    assert {name for name, value in alone.items() if value != later["talbot"]["cpu"][name]} >= {"stages_ms"}
    assert alone["pictures"] == later["talbot"]["cpu"]["pictures"]


@pytest.mark.parametrize("backend", ["cuda", "tensorrt-rtx"])
def test_every_part_runs_over_the_stand_ins(backend: str, tmp_path: Path) -> None:
    """The whole code on CUDA; of its figures only that they are there."""
    environment = os.environ | {"CALOTYPE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", OVER_STANDINS, backend]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout.splitlines()[-1]), on_gpu=True)


def test_the_unet_in_pytorch_eager_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "COMPILED", {"compiled": {"backend": "eager"}})
    found: dict[str, Any] = {}
    monkeypatch.setitem(gpu_parts.OTHERS, "pytorch", lambda item: PyTorchParts(item, "cpu"))
    measure(subject("pytorch"), lambda part, value=None: found.update({part: value}))
    assert found["ready"] == {"rows": 2, "pixels": 128, "dtype": "torch.float32"}
    assert found["eager"]["call_ms"]["median"] > 0
    assert found["compiled"]["call_ms"]["median"] > 0


def test_diffusers_takes_turns_with_calotype(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU, in float32, where both draw the same picture."""
    monkeypatch.setattr(gpu_diffusers, "FORMS", {"eager": None, "compiled": {"backend": "eager"}})
    monkeypatch.setitem(gpu_parts.OTHERS, "diffusers", lambda item: DiffusersParts(item, "cpu"))
    found: dict[str, Any] = {}
    item = Subject(model="talbot", backend="diffusers", work=tmp_path, rounds=1, steps=2)
    measure(item, lambda part, value=None: found.update({part: value}))
    assert found["ready"]["pixels"] == 128 and found["ready"]["versions"]["diffusers"]
    for part in ("eager", "compiled"):
        assert found[part]["psnr_db"] is None or found[part]["psnr_db"] > 45
        assert found[part]["ratio"]["median"] > 0
        assert found[part]["picture_ms"].keys() == {"calotype", "diffusers"}


def test_without_diffusers_or_at_another_size_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = DiffusersParts(Subject(model="sdxl", backend="diffusers", work=tmp_path), "cpu")
    with pytest.raises(NotRunError, match="Stable Diffusion 1"):
        parts.ready()
    monkeypatch.setattr(gpu_diffusers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NotRunError, match="diffusers is not installed"):
        parts.ready()


def told(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Callable[[], Any]]) -> list[tuple[str, Any]]:
    monkeypatch.setattr(gpu_parts, "parts", lambda _: parts)
    found: list[tuple[str, Any]] = []
    measure(subject(), lambda part, value=None: found.append((part, value)))
    return [item for item in found if item[1] is not None]


def test_a_part_that_fails_is_one_line_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ZeroDivisionError("a\nb")

    found = told(monkeypatch, {"ready": dict, "one": fails, "two": lambda: 2})
    assert found == [("ready", {}), ("one", {"failed": "ZeroDivisionError: a b"}), ("two", 2)]


def test_nothing_follows_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise NotRunError("it is not installed")

    found = told(monkeypatch, {"ready": absent, "one": lambda: 1})
    assert found == [("ready", {"not_run": "it is not installed"})]


def test_what_a_backend_warned_of_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns() -> dict[str, Any]:
        gpu_parts.logging.getLogger("calotype.runtime.sessions").warning("runs without a %s", "CUDA graph")
        return {}

    assert told(monkeypatch, {"ready": warns})[-1] == ("warnings", ["runs without a CUDA graph"])


def crashes(_: Subject, tell: Callable[..., None]) -> None:
    tell("one")
    tell("one", 1)
    tell("two")
    os.abort()


def hangs(_: Subject, tell: Callable[..., None]) -> None:
    tell("one")
    tell("one", 1)
    tell("two")
    time.sleep(3600)


def test_a_crash_costs_the_part_it_happens_in() -> None:
    assert list(gpu.run(subject(), math.inf, crashes)) == [("one", 1), ("two", {"failed": "its process ended with -6"})]


class Clock:
    """Tells these times, one after the other."""

    def __init__(self, *times: float) -> None:
        self._times = iter(times)

    def monotonic(self) -> float:
        return next(self._times)


def test_the_end_of_the_budget_costs_the_part_it_falls_into(monkeypatch: pytest.MonkeyPatch) -> None:
    start, one, its_value, two, end = 0.0, 0.0, 0.0, 0.0, 600.0
    monkeypatch.setattr(gpu, "time", Clock(start, one, its_value, two, end))
    assert list(gpu.run(subject(), 600, hangs)) == [
        ("one", 1),
        ("two", {"failed": "the budget was spent before it was done"}),
    ]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="nothing was measured: cuda-bindings is not installed"):
        gpu.main(["talbot", "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()
