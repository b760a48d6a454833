"""The report of the figures: all files, the same bytes each time, and a refusal of what it does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report as report_module
from benchmarks.machine import RESULTS
from benchmarks.micro.__main__ import BENCHMARKS
from benchmarks.report import write
from benchmarks.report_forms import MICRO


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


def test_peers_stand_beside_calotype_and_one_that_did_not_run_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(report_module, "PLOTTED", 1)
    plots = []
    for _ in range(2):
        write(tmp_path, tmp_path)
        plots.append((tmp_path / "plots" / "speed-sd1-256.svg").read_bytes())
    page = (tmp_path / "README.md").read_text()
    assert "| diffusers, PyTorch as it comes | 2.00 (1.50 to 2.50) times | 2 s / 1 s |" in page
    assert "- OpenVINO GenAI: out of memory" in page
    assert plots[0] == plots[1]


def micro(name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    about = {"command": "c", "commit": "abc", "machine": {"processor": "p"}, "measurement": name, "rounds": 3}
    return {**about, "rows": [{"title": f"row {number}", "forms": forms} for number, forms in enumerate(rows)]}


def test_small_benchmarks_are_tables_of_one_kind(tmp_path: Path) -> None:
    first = {"one node": {"ms": {"median": 0.5}}, "parts": {"ms": {"median": 1500}, "ratio": {"median": 0.25}}}
    ratio = {"median": 2, "min": 1, "max": 3}
    second = {"one node": {"failed": "it is"}, "parts": {"ms": {"median": 20}, "ratio": ratio, "off": 0.001}}
    (tmp_path / "micro-attention-x.json").write_text(json.dumps(micro("attention", first, second)))
    (tmp_path / "micro-growth-x.json").write_text(json.dumps(micro("growth", first)))
    write(tmp_path, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| row 0 | 500 µs | 1.5 s (0.25 times) |" in page
    assert "| row 1 | it is | 20 ms (2.00 (1.00 to 3.00) times), off 1.0e-03 |" in page
    assert "| parts | 1.5 s (0.25 times) |" in page  # a row alone stands on its side


def test_every_small_benchmark_has_a_title() -> None:
    assert set(MICRO) == set(BENCHMARKS)


def test_a_gpu_run_is_a_table_and_what_did_not_run_a_line_each(tmp_path: Path) -> None:
    time = {"median": 1.5, "min": 1.0, "max": 2.0}
    pictures = {"picture_ms": time, "steps": 50, "step_ms": 0.5, "host_us_per_step": 9.5, "gpu_memory_mib": 700.0}
    parity = {
        "pixels": 256,
        "unet on cuda": {"min_cosine": 0.99991},
        "vae on cuda": {"min_cosine": 0.9, "trouble": "x"},
    }
    cuda = {"parity": parity, "picture_parity": {"psnr_db": 41.5}, "pictures": pictures, "low_memory": {"failed": "it"}}
    torch = {"eager": {"call_ms": time, "gpu_memory_mib": 1000}, "compiled": {"failed": "no compiler"}}
    turns = {"ratio": time, "picture_ms": {"calotype": 2.0, "diffusers": 3.0}, "psnr_db": 40.5}
    peer = {"ready": {"pixels": 512}, "eager": turns, "compiled": {"failed": "no memory"}}
    models = {
        "sd1": {"diffusers": peer, "cuda": cuda, "pytorch": torch, "tensorrt": {"not_run": "the budget was spent"}}
    }
    about = {"command": "python -m benchmarks.gpu", "date": "2026-11-25", "driver": "580.1"}
    (tmp_path / "nvidia-x-2026-11-25.json").write_text(
        json.dumps({**about, "gpu": {"name": "NVIDIA X"}, "models": models})
    )
    write(tmp_path, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "## NVIDIA X" in page
    assert "| sd1 | cuda | 1.5 (50 steps) | 0.5 | 9.5 µs | 700.0 MiB | 0.900000 | 41.5 dB |" in page
    assert "| sd1 | PyTorch, eager | 1.5 |  |  | 1000 MiB |  |  |" in page
    assert "| sd1, 512 pixels | diffusers, eager | 3.0, 1.5 times Calotype's |  |  |  |  | 40.5 dB |" in page
    assert "- sd1, diffusers, compiled: no memory" in page
    assert "- sd1, cuda, low memory: it" in page
    assert "- sd1, pytorch, compiled: no compiler" in page
    assert "- sd1, tensorrt, not run: the budget was spent" in page


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    shutil.copyfile(next(RESULTS.glob("startup-*.json")), tmp_path / "other.json")
    with pytest.raises(SystemExit, match=r"other\.json is of no kind"):
        write(tmp_path, tmp_path)
