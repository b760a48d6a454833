"""What a GPU run writes of the operators that are put together, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.micro import __main__ as micro
from benchmarks.micro import fusions
from benchmarks.subject import Subject
from calotype.runtime.sessions import cuda_fusions, onnxruntime_cuda

OVER_STANDINS = """
import json
from pathlib import Path
from tests.computing_standins import install
install()
from benchmarks.micro import fusions
from benchmarks.subject import Subject
from calotype.runtime.sessions import cuda_fusions
fusions.RUNS = 1
def broken(graph):
    raise ArithmeticError("it is")
cuda_fusions.broken, fusions.VARIANTS["broken"] = broken, fusions.Variant(fusions=("broken",))
told = []
subject = Subject(model="talbot", backend="cuda", work=Path("unused"), rounds=1)
fusions._variants(["none", "broken", "all fusions, sums"], subject, lambda *item: told.append(item))
"""


def about() -> dict[str, Any]:
    return {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "date": "2026-01-01"}


def test_variants_are_compared_and_take_turns_and_one_that_fails_is_a_line() -> None:
    code = OVER_STANDINS + "found = {}\nfor name, *value in told:\n    found.setdefault(name, []).extend(value)\n"
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", code + "print(json.dumps(found))"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert found["broken"] == [{"failed": "ArithmeticError: it is"}]
    for name in ("none", "all fusions, sums"):
        first, times = found[name][:2]
        assert first["off"] < 5e-3
        assert len(first["open_and_first_runs_s"]) == 4
        assert 0 < times["ms"]["min"] <= times["ms"]["median"]
    assert found["none"][0]["off"] == 0
    assert found["all fusions, sums"][0]["off"] > 0
    assert "ratio" not in found["none"][1] and found["all fusions, sums"][1]["ratio"]["median"] > 0


def test_the_sessions_own_variant_is_among_them() -> None:
    own = fusions.VARIANTS["all fusions, sums"]
    assert [getattr(cuda_fusions, name) for name in own.fusions] == list(onnxruntime_cuda.FUSIONS)
    assert own.sums == onnxruntime_cuda.SUMS
    options = {**fusions.NONE, **own.options}
    assert {name: options[name] for name in options if name in onnxruntime_cuda.SETTINGS} == {
        name: value for name, value in onnxruntime_cuda.SETTINGS.items() if name in options
    }


def test_a_crash_costs_its_variant_and_the_others_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    crash, asked = {"failed": "its process ended with -6"}, list[list[str]]()
    said: Iterator[list[tuple[str, Any]]] = iter(
        [[("none", {"off": 0}), ("sums", crash)], [("none", {"off": 0}), ("all", {"off": 1}), ("end", crash)]]
    )

    def run(_: Subject, __: float, work: Any) -> list[tuple[str, Any]]:
        asked.append(list(work.args[0]))
        return next(said)

    monkeypatch.setattr(gpu, "run", run)
    subject = Subject(model="talbot", backend="cuda", work=Path())
    found = list(fusions.measured(subject, ["none", "sums", "all"]))
    assert found == [("none", {"off": 0}), ("sums", crash), ("none", {"off": 0}), ("all", {"off": 1})]
    assert asked == [["none", "sums", "all"], ["none", "all"]]


def test_variants_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*_: Any) -> Iterator[tuple[str, Any]]:
        yield "none", {"off": 0.0}
        yield "none", {"ms": {"median": 1.0}}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "about", lambda **_: about())
    monkeypatch.setattr(fusions, "measured", stops)
    monkeypatch.setattr(micro, "RESULTS", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        micro.main(["fusions", "talbot", "--write"])
    report = json.loads((tmp_path / "micro-fusions-talbot-nvidia-h100-80gb-hbm3.json").read_text())
    (row,) = report["rows"]
    assert row["forms"] == {"none": {"off": 0.0, "ms": {"median": 1.0}}}


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(SystemExit, match="nothing was measured: cuda-bindings is not installed"):
        micro.main(["fusions", "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()
