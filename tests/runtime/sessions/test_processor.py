"""How many threads this process may have: by variable, by affinity, by control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calotype.runtime.arguments import MOST_THREADS
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session, processor
from calotype.runtime.sessions.processor import cgroup_processors, usable_threads


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen cores, all of them ours."""
    for variable in ("CALOTYPE_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(processor, "_cores", len)
    monkeypatch.setattr(processor, "cgroup_processors", lambda: None)


@pytest.mark.parametrize(
    ("variables", "affinity", "quota", "threads"),
    [
        ({}, 16, None, 16),
        ({}, 3, None, 3),
        ({}, 16, 2.5, 3),
        ({}, 16, 0.2, 1),
        ({}, 2, 8.0, 2),
        ({"OMP_NUM_THREADS": "4"}, 16, None, 4),
        ({"OMP_NUM_THREADS": "4,2"}, 16, None, 4),
        ({"OMP_NUM_THREADS": "4", "CALOTYPE_THREADS": "5"}, 2, 1.0, 5),
        ({"OMP_NUM_THREADS": "", "CALOTYPE_THREADS": " "}, 16, None, 16),
    ],
)
def test_the_narrowest_limit_counts_and_a_variable_before_all(
    variables: dict[str, str], affinity: int, quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(processor, "cgroup_processors", lambda: quota)
    assert usable_threads() == threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_variable_that_is_no_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_THREADS", text)
    with pytest.raises(InputError, match=f"CALOTYPE_THREADS='{text}' is no number of threads; use 1 or more"):
        usable_threads()


@pytest.mark.parametrize("text", [str(MOST_THREADS + 1), "999999999", "9" * 5000])
def test_more_threads_than_can_run(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(InputError, match=rf"OMP_NUM_THREADS=.* than can run here; use 1 to {MOST_THREADS}"):
        usable_threads()
    with pytest.raises(InputError, match=rf"^threads=.* is outside 1\.\.{MOST_THREADS}; use {MOST_THREADS}"):
        Pipeline.load("talbot", "cpu", threads=MOST_THREADS + 1)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "800000 100000"}, 1.0),
        ("0::/../elsewhere", {"cpu.max": "400000 100000"}, 4.0),  # of a container that sees its own alone
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu,cpuacct:/out", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("1:memory:/a\n0::/a", {"unified/a/cpu.max": "200000 100000"}, 2.0),
        ("1:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "1"}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)
def test_control_groups(groups: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cgroup_processors(tmp_path / "cgroup", tmp_path / "fs") == quota


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_processors(tmp_path / "nothing", tmp_path) is None


def test_two_threads_of_a_core_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for number in range(4):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 2},{number % 2 + 2}\n")
    assert [processor._cores(numbers, tmp_path) for numbers in ({0, 1, 2, 3}, {0, 2}, {1, 2})] == [2, 1, 2]
    assert processor._cores({0, 9}, tmp_path) == 2


@pytest.mark.parametrize(("threads", "more"), [(1, 0), (3, 2)])
def test_a_session_has_so_many_threads_and_no_more(threads: int, more: int) -> None:
    talbot = Bundle.open("talbot")
    before = len(list(Path("/proc/self/task").iterdir()))
    with open_session(talbot.path, talbot.manifest.networks["unet_shallow"], "cpu", threads=threads):
        assert len(list(Path("/proc/self/task").iterdir())) == before + more
    with pytest.raises(InputError, match="threads=0"):
        open_session(talbot.path, talbot.manifest.networks["unet_shallow"], "cpu", threads=0)
