"""The harness of the small benchmarks: turns, sampling, one shape of results, and the list."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks
from benchmarks import timing
from benchmarks.micro import __main__ as micro
from benchmarks.micro.harness import Options, Result, Row, times
from benchmarks.report import COMMANDS
from calotype.runtime.errors import BackendError

ROOT = Path(__file__).parent.parent.parent


def test_calls_take_turns_and_what_warms_up_is_not_counted() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    seconds, made = timing.in_turns(
        {"a": lambda: order.append("a") or 1, "b": lambda: order.append("b") or 2},
        2,
        clock=lambda: float(next(ticks)),
        before={"a": lambda: order.append("before a"), "b": lambda: None},
    )
    assert order == ["before a", "a", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert made == {"a": 1, "b": 2}


def test_a_ratio_is_of_times_in_the_same_round() -> None:
    found = times({"first": [1.0, 10.0, 2.0], "second": [2.0, 30.0, 1.0]})
    assert found["first"] == {"ms": {"median": 2000, "min": 1000, "max": 10000}}
    assert found["second"]["ratio"] == {"median": 2, "min": 0.5, "max": 3}
    assert times({}) == {}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A small benchmark of four rows, of which one was measured elsewhere, in the place of ``growth``."""

    def rows(options: Options) -> Iterator[Row | Result]:
        options.about["variant"] = options.own.kind
        for title in options.some(["one", "two", "three", "four"]):
            if title == "three":
                yield Result(title=title, forms={"here": {"failed": "it is"}})
            else:
                forms = {"here": lambda: 1, "there": lambda: 2}
                yield Row(
                    title=title, forms=forms, more=lambda made, _: {name: {"made": own} for name, own in made.items()}
                )

    def arguments(parser: Any) -> None:
        parser.add_argument("--kind", default="small")

    found = SimpleNamespace(rows=rows, arguments=arguments, __doc__="About.")
    monkeypatch.setattr(micro.importlib, "import_module", lambda _: found)
    return found


@pytest.mark.usefixtures("module")
def test_every_benchmark_writes_one_shape(capsys: pytest.CaptureFixture[str]) -> None:
    micro.main(["growth", "--rounds", "3", "--every", "2", "--kind", "large one"])
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "python -m benchmarks.micro growth --rounds 3 --every 2 --kind 'large one'"
    assert {"date", "commit", "machine"} <= report.keys()
    assert (report["measurement"], report["rounds"], report["variant"]) == ("growth", 3, "large one")
    first, second = report["rows"]
    assert (first["title"], second["title"]) == ("one", "three")
    assert first["forms"]["here"].keys() == {"ms", "made"}
    assert first["forms"]["there"].keys() == {"ms", "ratio", "made"}
    assert second == {"title": "three", "facts": {}, "forms": {"here": {"failed": "it is"}}}


@pytest.mark.usefixtures("module")
def test_results_take_the_place_of_those_of_the_same_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro, "results", lambda name: tmp_path / f"{name}-here.json")
    for rounds in ("2", "1"):
        micro.main(["growth", "--rounds", rounds, "--write"])
    (path,) = tmp_path.iterdir()
    assert path.name == "micro-growth-small-here.json"
    report = json.loads(path.read_text())
    assert (report["command"], report["rounds"]) == ("python -m benchmarks.micro growth --rounds 1", 1)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--every", "0"]])
def test_nothing_or_less_of_it_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        micro.main(["growth", *wrong])
    assert "--rounds and --every are 1 or more" in capsys.readouterr().err


def test_without_a_name_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    micro.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(micro.BENCHMARKS)
    with pytest.raises(SystemExit, match="there is no small benchmark 'growht'; valid: attention,"):
        micro.main(["growht"])


@pytest.mark.parametrize("name", micro.BENCHMARKS)
def test_every_one_on_the_list_is_there(name: str) -> None:
    source = ROOT / "benchmarks" / "micro" / f"{micro.BENCHMARKS[name].module or name}.py"
    assert "\ndef rows(options: Options)" in source.read_text()


@pytest.mark.parametrize("name", [name for name, *_ in COMMANDS if name != "benchmarks.micro"])
def test_a_command_without_its_packages_ends_in_one_line(name: str) -> None:
    """In an interpreter that finds no installed package."""
    command = [sys.executable, "-S", "-m", name]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert " is not installed for " in run.stderr and "`make bench`" in run.stderr


def test_an_error_of_calotype_is_one_line_and_another_keeps_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks.explain(BackendError, BackendError("there is no GPU"), None)
    assert capsys.readouterr().err == "error: there is no GPU\n"
    benchmarks.explain(ZeroDivisionError, ZeroDivisionError("by zero"), None)
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err
