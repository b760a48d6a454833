"""The plan cache as others left it: what is not the user's alone is passed over with a line, never opened."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.engine import cache
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.cli.main import run
from calotype.runtime.errors import BuildError
from calotype.runtime.sessions import open_session, plans, private
from calotype.runtime.sessions.records import PlanRecord
from tests.engine.test_cache import KEY, Builder

STRANGER = 4242


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


@pytest.fixture
def plan(folder: Path) -> Path:
    assert not folder.exists()
    return cache.obtain(KEY, Builder(), lambda _: None)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``path`` belong to somebody else: as root really, else by being somebody else."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


def test_what_was_built_is_private(folder: Path, plan: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private.read_private(plan) == b"a plan"
    assert plans.plan_trouble(plan) is None
    assert plans.list_plans() == [plan]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_to_is_not_read(plan: Path, mode: int) -> None:
    for path in (plan, plans.sidecar(plan)):
        path.chmod(mode)
        with pytest.raises(PermissionError, match="Others can write to it: its mode is 0"):
            private.read_private(path)
        assert "Others can write to it" in str(plans.plan_trouble(plan))
        path.chmod(0o600)
    assert plans.plan_trouble(plan) is None


def test_a_file_of_somebody_else_is_not_read(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = plans.describe_plan(plan)
    give_away(plan, monkeypatch)
    assert "It belongs to user" in str(plans.plan_trouble(plan))
    with pytest.raises(BuildError, match=r"It belongs to user \d+, not to you or root; build it again"):
        plans.read_plan(plan, record)


def test_links_are_not_followed(plan: Path, tmp_path: Path) -> None:
    for path in (plan, plans.sidecar(plan)):
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert "It is a link" in str(plans.plan_trouble(plan))
        path.unlink()
        (tmp_path / "elsewhere").rename(path)


def test_a_pipe_is_no_plan(plan: Path) -> None:
    plan.unlink()
    os.mkfifo(plan, 0o600)
    assert "It is a pipe, a device or a socket" in str(plans.plan_trouble(plan))


@pytest.mark.parametrize("spoil", ["mode", "owner", "link"])
def test_a_folder_that_is_not_the_users_alone_has_no_plans(
    folder: Path,
    plan: Path,
    spoil: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if spoil == "mode":
        folder.chmod(0o777)
    elif spoil == "owner":
        give_away(folder, monkeypatch)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert plans.list_plans() == plans.list_plans() == []
    assert len(caplog.messages) == 1
    assert f"the plans in {folder} are passed over" in caplog.messages[0]
    with pytest.raises(BuildError, match="set CALOTYPE_CACHE to a"):
        plans.cache_folder()
    assert plan.name in {path.name for path in tmp_path.rglob("*.plan")}


def test_a_read_only_cache_of_root_serves(folder: Path, plan: Path) -> None:
    """As one that was baked into an image: all may read it, nobody writes."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert plans.list_plans() == [plan]
        assert plans.plan_trouble(plan) is None
        assert [path for path, _ in plans.sound_records()] == [plan]
    finally:
        folder.chmod(0o700)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "without precision": lambda record: record | {"key": {k: v for k, v in record["key"].items() if k != "precision"}},
    "key is a list": lambda record: record | {"key": []},
    "steers a terminal": lambda record: record | {"key": record["key"] | {"gpu": "\x1b[2J"}},
    "figures": lambda record: record | {"figures": {"seconds": "x"}},
    "tensors": lambda record: record | {"tensors": {"profiles": [{"sample": []}]}},
    "weights": lambda record: record | {"weights": {"size": -1}},
    "size": lambda record: record | {"size": True},
    "a list": lambda record: [record],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_record_is_passed_over_with_a_line(
    plan: Path, format1: Path, how: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(plans.sidecar(plan).read_text())
    plans.sidecar(plan).write_text(json.dumps(HOSTILE[how](record)))
    with caplog.at_level(logging.WARNING):
        assert list(plans.sound_records()) == []
    assert f"the plan {plan.name} is passed over: its record cannot be read: record" in caplog.messages[0]
    assert caplog.messages[0].isprintable()
    assert run(["build", "--list"]) == 0
    assert "its record cannot be read" in capsys.readouterr().out
    assert run(["info", str(format1)]) == 0
    assert run(["info", str(plan)]) == 1
    assert capsys.readouterr().err.count("build it again with: calotype build") >= 1


def test_info_of_a_plan_that_states_little(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = plans.describe_plan(plan)
    bare = dataclasses.asdict(dataclasses.replace(record, figures={}, tensors={}))
    plans.sidecar(plan).write_text(json.dumps(bare))
    assert run(["info", str(plan)]) == 0
    assert "built by:   tensorrt-rtx 1 in ? s" in capsys.readouterr().out


@pytest.fixture(scope="module")
def built(format1: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of a cache with one engine, and that."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setenv("CALOTYPE_CACHE", home)
        engines = build_engines(Bundle.open(format1), networks=["vae_decoder"])
        yield Path(home), engines["vae_decoder"]


@pytest.fixture
def engine(built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That engine in a cache of its own, to be changed."""
    shutil.copytree(built[0], tmp_path / "cache")
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans" / built[1].name


def test_weights_that_changed_with_their_times_kept_are_found_by_verify(
    engine: Path, format1: Path, capsys: Any
) -> None:
    assert run(["verify", str(format1)]) == 0
    assert "1 plans of it are intact" in capsys.readouterr().out
    weights = plans.weights_of(engine)
    times, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    spec = Bundle.open(format1).manifest.networks["vae_decoder"]
    with open_session(format1, spec, "cpu") as session:
        assert getattr(session, "engine", None) == engine  # a start does not read them
    assert run(["verify", str(format1)]) == 1
    assert f"{weights.name} is not the file that it was built with; build it again" in capsys.readouterr().err


def test_an_engine_of_somebody_else_is_passed_over(engine: Path, format1: Path, caplog: Any) -> None:
    plans.weights_of(engine).chmod(0o666)
    spec = Bundle.open(format1).manifest.networks["vae_decoder"]
    with caplog.at_level(logging.WARNING), open_session(format1, spec, "cpu") as session:
        assert getattr(session, "engine", None) is None
    assert "Others can write to it" in caplog.text


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CALOTYPE_CACHE": "~/cc", "HOME": "/home/me"}, "/home/me/cc/plans"),
        ({"CALOTYPE_CACHE": "/c"}, "/c/plans"),
        ({"CALOTYPE_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/calotype/plans"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/calotype/plans"),
        ({"HOME": "/home/me"}, "/home/me/.cache/calotype/plans"),
        ({"HOME": "relative"}, None),
        ({}, None),
    ],
)
def test_where_the_cache_lies(variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("CALOTYPE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert plans.cache_home() == (None if expected is None else Path(expected))
    if expected is None:
        assert plans.list_plans() == []
        with pytest.raises(BuildError, match="there is no home folder to keep plans in; set CALOTYPE_CACHE"):
            plans.cache_folder()


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", "~no-such-user/cc")
    with pytest.raises(BuildError, match="CALOTYPE_CACHE=~no-such-user/cc is in a home folder that is not known"):
        plans.cache_home()


def test_a_record_survives_being_written(plan: Path) -> None:
    record = PlanRecord.read(plans.sidecar(plan))
    assert dataclasses.asdict(record) == json.loads(plans.sidecar(plan).read_text())
    assert FileRecord.of(plan) == FileRecord(size=record.size, sha256=record.sha256)
