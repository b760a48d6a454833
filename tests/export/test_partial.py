"""A bundle in the making, in a folder that others write to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from calotype.export.bundle import export_checkpoint
from calotype.export.partial import FINISHED, PartialBundle
from calotype.runtime.errors import ExportError


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's own that has nothing to do with the export."""
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "letter.txt").write_text("precious")
    (folder / "deep" / "letter.txt").write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(partial: PartialBundle, name: str = "unet.safetensors", text: str = "weights") -> None:
    path = partial.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    partial.finish(name, "key", [name], {})


@pytest.mark.parametrize("force", [False, True])
def test_a_link_in_the_place_of_the_partial_folder_is_not_followed(tmp_path: Path, precious: Path, force: bool) -> None:
    (tmp_path / ".out.partial").symlink_to(precious)
    before = contents(precious)
    with (
        pytest.raises(ExportError, match=r"\.out\.partial is in the way: it is no folder; remove it"),
        PartialBundle(tmp_path / "out", replace=force),
    ):
        pass
    assert contents(precious) == before


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    (folder / FINISHED).write_text("{}")
    folder.chmod(mode)
    with pytest.raises(ExportError, match="others than you can write there"), PartialBundle(tmp_path / "out"):
        pass
    assert contents(folder) == {FINISHED: "{}"}


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".out.partial").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ExportError, match="others than you can write there"), PartialBundle(tmp_path / "out"):
        pass


def test_it_is_this_users_alone_while_it_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with PartialBundle(tmp_path / "out") as partial:
            assert stat.S_IMODE(partial.folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_exported_files_have_one_mode(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    before = os.umask(mask)
    try:
        with PartialBundle(tmp_path / "out") as partial:
            write(partial)
            write(partial, "tokenizer/vocab.json")
            (partial.folder / "stray").write_text("left over")
            partial.publish("{}")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (out, *out.rglob("*"))}
    assert modes == {
        "out": folder,
        "tokenizer": folder,
        "unet.safetensors": file,
        "vocab.json": file,
        "calotype.json": file,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_removes_what_is_its_own_alone(tmp_path: Path, precious: Path) -> None:
    before = contents(precious)
    with pytest.raises(ValueError, match="failed"), PartialBundle(tmp_path / "out") as partial:
        write(partial)
        (partial.folder / "deep").mkdir()
        (partial.folder / "link").symlink_to(precious)
        raise ValueError("failed")
    assert contents(precious) == before
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_a_folder_that_is_exchanged_meanwhile(tmp_path: Path, precious: Path) -> None:
    before = contents(precious)
    with (
        pytest.raises(ExportError, match="was exchanged by somebody else meanwhile"),
        PartialBundle(tmp_path / "out") as partial,
    ):
        write(partial)
        partial.folder.rename(tmp_path / "stolen")
        partial.folder.symlink_to(precious)
        partial.publish("{}")
    assert contents(precious) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_place_that_is_taken_meanwhile_loses_neither(tmp_path: Path, precious: Path, force: bool) -> None:
    before = contents(precious)
    with (
        pytest.raises(ExportError, match="was made by somebody else meanwhile; remove it and run this again"),
        PartialBundle(tmp_path / "out", replace=force) as partial,
    ):
        write(partial)
        precious.rename(tmp_path / "out")
        partial.publish("{}")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out").rename(precious)
    with PartialBundle(tmp_path / "out", replace=force) as partial:
        assert partial.take_up("unet.safetensors", "key") == {}
        partial.publish("{}")
    assert (tmp_path / "out" / "unet.safetensors").read_text() == "weights"


def test_a_bundle_made_meanwhile_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="somebody else"), PartialBundle(out) as partial:
        write(partial)
        out.mkdir()
        (out / "calotype.json").write_text("another's")
        partial.publish("{}")
    assert (out / "calotype.json").read_text() == "another's"
    with PartialBundle(out, replace=True) as partial:
        partial.publish("{}")
    assert (out / "calotype.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["nowhere", "out"], ids=["dangling", "loop"])
def test_a_link_in_the_bundles_place_is_said_before_the_work(tmp_path: Path, target: str) -> None:
    (tmp_path / "out").symlink_to(target)
    for force in (False, True):
        with pytest.raises(ExportError, match="out exists already"):
            export_checkpoint("no such checkpoint", tmp_path / "out", force=force)
    assert (tmp_path / "out").readlink() == Path(target)


def test_a_bundle_behind_a_link_is_replaced_by_its_link(tmp_path: Path, precious: Path) -> None:
    (precious / "calotype.json").write_text("old")
    (tmp_path / "out").symlink_to(precious)
    before = contents(precious)
    with PartialBundle(tmp_path / "out", replace=True) as partial:
        write(partial)
        partial.publish("{}")
    assert contents(precious) == before
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_where_the_old_bundle_would_go(tmp_path: Path, precious: Path, kind: str) -> None:
    replaced = tmp_path / ".out.replaced"
    replaced.symlink_to(precious) if kind == "link" else replaced.touch()
    before = contents(precious)
    with PartialBundle(tmp_path / "out", replace=True) as partial:
        write(partial)
        partial.publish("{}")
    assert contents(precious) == before
    assert json.loads((tmp_path / "out" / "calotype.json").read_text()) == {}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with PartialBundle(tmp_path / "out") as partial:
        partial.publish("{}")
    assert "lies on a file system without locks; run no other export of it meanwhile" in caplog.text
