"""The plan cache, with builders that build nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from calotype.engine import cache
from calotype.engine.cache import Built
from calotype.runtime.errors import BuildError
from calotype.runtime.sessions import plans

KEY = {
    "bundle": "tiny model",
    "network": "unet",
    "backend": "tensorrt-rtx",
    "version": "1",
    "graph": "0",
    "weights": ["1"],
    "precision": "float16",
    "profiles": [{"name": "default", "batch": "1:2:8", "height": "512", "width": "512"}],
    "version_compatible": False,
    "hardware_compatible": False,
    "stripped": False,
    "gpu": "portable",
    "driver": "none",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Built:
        self.calls += 1
        return Built(plan=b"a plan", tensors={"inputs": []}, figures={"seconds": 1.5})


def test_a_plan_is_built_once_and_is_the_users_alone(folder: Path) -> None:
    build, lines = Builder(), []
    path = cache.obtain(KEY, build, lines.append)
    assert cache.obtain(KEY, build, lines.append) == path
    assert build.calls == 1
    assert path.read_bytes() == b"a plan"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert "not built before" in lines[0]
    assert "taken from the cache" in lines[1]
    record = plans.describe_plan(path)
    assert (record.key, record.tensors, record.figures, record.size) == (KEY, {"inputs": []}, {"seconds": 1.5}, 6)
    cache.obtain(KEY, build, lines.append, force=True)
    assert build.calls == 2
    assert "as asked" in lines[2]


def test_what_changed_is_said() -> None:
    build, lines = Builder(), []
    first = cache.obtain(KEY, build, lines.append)
    second = cache.obtain(KEY | {"version": "2", "driver": "13000"}, build, lines.append)
    assert "these changed: driver, version" in lines[1]
    assert plans.list_plans() == sorted([first, second])


def test_another_precision_is_no_change() -> None:
    build, lines = Builder(), []
    cache.obtain(KEY | {"precision": "float32", "version": "1"}, build, lines.append)
    cache.obtain(KEY | {"precision": "int8", "version": "1"}, build, lines.append)
    cache.obtain(KEY | {"precision": "float32", "version": "2"}, build, lines.append)
    assert "not built before" in lines[1]
    assert "these changed: version" in lines[2]


def test_one_flipped_byte_is_built_again() -> None:
    build, lines = Builder(), []
    path = cache.obtain(KEY, build, lines.append)
    path.write_bytes(b"a plaN")
    with pytest.raises(BuildError, match="sha256 is not the recorded one"):
        plans.describe_plan(path)
    cache.obtain(KEY, build, lines.append)
    assert build.calls == 2
    assert "sha256 is not the recorded one" in lines[1]
    assert path.read_bytes() == b"a plan"


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", "{", "[" * 100_000, '{"size": ' + "1" * 5000 + "}"])
def test_a_broken_record_is_built_again(text: str | None) -> None:
    build = Builder()
    path = cache.obtain(KEY, build, print)
    record = path.with_name(path.name + ".json")
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    cache.obtain(KEY, build, print)
    assert build.calls == 2


def test_an_interrupted_build_leaves_no_plan(folder: Path) -> None:
    def interrupted() -> Built:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.obtain(KEY, interrupted, print)
    assert list(folder.iterdir()) == []
    build = Builder()
    cache.obtain(KEY, build, print)
    assert build.calls == 1


def _slow(log: str, seconds: float) -> None:
    def build() -> Built:
        with Path(log).open("a") as file:
            file.write("x")
        time.sleep(seconds)
        return Built(plan=b"a plan", tensors={}, figures={})

    cache.obtain(KEY, build, lambda _: None)


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_slow, args=(str(log), 0.5)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text() == "x"


def test_a_killed_builder_holds_nothing_up(tmp_path: Path, folder: Path) -> None:
    log = tmp_path / "log"
    process = multiprocessing.get_context("spawn").Process(target=_slow, args=(str(log), 3600))
    process.start()
    while process.is_alive() and not log.exists():
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(600)
    assert not list(folder.glob("*.plan"))
    build = Builder()
    path = cache.obtain(KEY, build, print)
    assert build.calls == 1
    assert not plans.describe_plan(path).tensors["inputs"]
    assert not list(folder.glob("*.lock"))


def test_a_lock_whose_file_its_holder_removed_is_taken_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that waited for one file would otherwise hold two of one name."""
    path, real, removed = cache.plan_path(KEY), cache.lock, []

    def late(descriptor: int, *, wait: bool) -> bool:
        if not removed:
            removed.append(path.with_name(path.name + ".lock"))
            removed[0].unlink()
        return real(descriptor, wait=wait)

    monkeypatch.setattr(cache, "lock", late)
    with cache._lock(path, None):
        assert removed[0].exists()
        with pytest.raises(BlockingIOError), cache._lock(path, None):
            pass
    assert list(folder.iterdir()) == []


def test_clean_removes_plans_and_what_a_killed_builder_left(folder: Path) -> None:
    path = cache.obtain(KEY, Builder(), print)
    (folder / "other.plan.partial").write_bytes(b"half")
    (folder / "other.plan.json.partial").write_bytes(b"half")
    (folder / "gone.plan.jit").write_bytes(b"kernels")
    (folder / "gone.plan.lock").touch()
    with cache.kept_file(folder / "tensorrt.timing") as (data, replace):
        assert data == b""
        replace(b"measured")
    with cache.kept_file(folder / "tensorrt.timing") as (data, _):
        assert data == b"measured"
    assert cache.clean_plans() > 6 + 4 + 4 + 7 + 8
    assert not path.exists()
    assert list(folder.iterdir()) == []
    assert plans.list_plans() == []


def test_a_cache_that_cannot_be_made_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="set CALOTYPE_CACHE"):
        plans.cache_folder()


def test_a_file_system_without_locks_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    lines: list[str] = []
    assert cache.obtain(KEY, Builder(), lines.append).exists()
    assert f"{folder} is on a file system without locks" in lines[0]
    assert cache.clean_plans() > 0


def test_a_cache_that_cannot_be_written_says_what_to_do(folder: Path) -> None:
    path = cache.obtain(KEY, Builder(), print)
    path.with_name(path.name + ".lock").symlink_to(folder / "elsewhere")
    with pytest.raises(BuildError, match=r"\.lock cannot be written: .*; free some space or set CALOTYPE_CACHE"):
        cache.obtain(KEY, Builder(), print)
    assert not (folder / "elsewhere").exists()


def test_a_long_name_of_a_bundle_is_cut() -> None:
    assert cache.obtain(KEY | {"bundle": "x" * 300}, Builder(), print).name.startswith("x" * 60 + ".unet.")
