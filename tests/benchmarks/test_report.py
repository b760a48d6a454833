"""The report of the figures: all files, the same bytes each time, and a refusal of what it does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import RESULTS
from benchmarks.report import write


def test_all_results_become_one_page_that_is_always_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(RESULTS, tmp_path / name)
    pages = [(tmp_path / name / "README.md").read_text() for name in ("one", "two")]
    assert pages[0] == pages[1] == (RESULTS.parent / "README.md").read_text()


def figures(seconds: float) -> dict[str, Any]:
    value = {"median": seconds, "min": seconds, "max": seconds}
    return {
        "picture_s": value,
        "step_s": value,
        "load_s": {"import": 1.0, "load": 2.0},
        "peak_mb": {"resident": 100, "anonymous": 50},
    }


def test_peers_stand_beside_calotype_and_one_that_did_not_run_is_named_with_its_reason(tmp_path: Path) -> None:
    about = {"date": "2026-11-25", "commit": "abc", "rounds": 3, "machine": {"processor": "one", "cores": 2}}
    ran = {
        "calotype": figures(1.0),
        "peer": figures(2.0),
        "ratio": {"median": 2.0, "min": 1.5, "max": 2.5},
        "psnr_db": None,
    }
    pairs = {"diffusers": {**about, **ran}, "openvino": {**about, "not_run": "out of memory"}}
    report = {"model": "sd1", "size": 256, "steps": 4, "images": 1, "pairs": pairs}
    (tmp_path / "speed-sd1-256.json").write_text(json.dumps(report))
    plots = []
    for _ in range(2):
        write(tmp_path, tmp_path)
        plots.append((tmp_path / "plots" / "speed-sd1-256.svg").read_bytes())
    page = (tmp_path / "README.md").read_text()
    assert "| diffusers, PyTorch as it comes | 2.00 (1.50 to 2.50) times | 2 s / 1 s |" in page
    assert "- OpenVINO GenAI: out of memory" in page
    assert plots[0] == plots[1]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    shutil.copyfile(next(RESULTS.glob("startup-*.json")), tmp_path / "other.json")
    with pytest.raises(SystemExit, match=r"other\.json is of no kind"):
        write(tmp_path, tmp_path)
