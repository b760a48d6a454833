"""What the tests keep: made once, handed out as copies, forgotten when its makers change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kept import FORGOTTEN, ROOT, Kept, digest, imported

HERE = Path(__file__)


def fill(folder: Path) -> None:
    (folder / "file").write_text("whole")


def never(_: Path) -> None:
    raise AssertionError("it is there already")


def test_it_is_made_once_and_a_copy_can_be_spoilt(tmp_path: Path) -> None:
    first = Kept(tmp_path / "kept", tmp_path / "first", [HERE])("name", fill)
    (first / "file").write_text("spoilt")
    second = Kept(tmp_path / "kept", tmp_path / "second", [HERE])("name", never)
    assert (second / "file").read_text() == "whole"


def test_what_failed_half_way_is_made_anew(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "other").touch()
        raise OSError("the disk is full")

    kept = Kept(tmp_path / "kept", tmp_path / "copies", [HERE])
    with pytest.raises(OSError, match="the disk is full"):
        kept("name", fail)
    assert [path.name for path in kept("name", fill).iterdir()] == ["file"]


def test_what_former_sources_made_is_removed_in_time(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, age in ((new, FORGOTTEN - 600), (old, FORGOTTEN + 600)):
        folder.mkdir()
        times = folder.stat().st_mtime - age
        os.utime(folder, (times, times))
    Kept(tmp_path, tmp_path / "copies", [HERE])
    assert (new.exists(), old.exists()) == (True, False)


def test_its_name_tells_what_made_it() -> None:
    assert digest([HERE]) != digest([ROOT / "tests" / "conftest.py"])
    found = {str(path.relative_to(ROOT)) for path in imported(ROOT / "export" / "bundle.py")}
    assert {"export/tracing.py", "runtime/bundle/manifest.py", "runtime/errors.py"} <= found
