"""Where figures are said to come from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu, machine


def test_a_copy_without_history_is_of_the_commit_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    assert gpu.about(need_gpu=False)["commit"] is None
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert gpu.about(need_gpu=False)["commit"] == "abc1234"


def test_history_counts_where_the_environment_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    assert machine.commit() == git("log", "-1", "--format=%h").strip()
    (tmp_path / "README.md").touch()
    assert not machine.commit().endswith("-dirty")  # no figure depends on it
    (tmp_path / "file").touch()
    assert machine.commit().endswith("-dirty")
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


def test_results_of_two_processors_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "AMD EPYC, AVX-512": "amd-epyc",
        "Intel(R) Xeon(R) Processor, AVX-512": "intel-xeon",
        "12th Gen Intel(R) Core(TM) i7-12700H CPU @ 2.60GHz": "12th-gen-intel-core-i7-12700h",
    }
    for processor, name in names.items():
        monkeypatch.setattr(machine, "_processor", lambda processor=processor: processor)
        assert machine.results("speed-sd1-256") == machine.RESULTS / f"speed-sd1-256-{name}.json"
    assert machine.slug("NVIDIA H200") == "nvidia-h200"
