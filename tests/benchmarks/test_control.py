"""What the report says of the benchmark of control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import control, report


def test_the_report_has_a_line_for_each_case(tmp_path: Path) -> None:
    second = {"median": 2.0, "min": 1.0, "max": 3.0}
    sides: dict[str, Any] = {name: {"step_s": second} for name in ("calotype", "diffusers")}
    stages = {
        stage: {
            "cases": {case: {**sides, "times": second} for case in cases},
            "own_mb": {"calotype": 1, "diffusers": 2},
        }
        for stage, cases in control.STAGES.items()
    }
    about = {"command": "x", "commit": "y", "date": "z", "machine": {"processor": "p", "load": 1}, "model": "sd1"}
    page = report.control("control-x", {**about, "size": 256, "rounds": 2, "stages": stages}, tmp_path)
    for case in (case for cases in control.STAGES.values() for case in cases):
        assert f"| {report.CONDITIONED[case]} | 2 s | 2 s |" in page
