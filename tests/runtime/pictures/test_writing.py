"""Pictures on disk: settings that come back, nothing half-written, and no name taken from anybody."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from calotype.runtime.errors import OutputError
from calotype.runtime.pictures import new_file
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pictures.parameters import parse_parameters
from calotype.runtime.pictures.writing import check_target, save_new
from tests.runtime.pictures.test_parameters import PARAMETERS, TEXT

PICTURE = Image.new("RGB", (64, 32), "red")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize(
    "prompt", ["a red apple, noto style", "ein Äpfelchen 🍎", "a\nNegative prompt: \x1b[31m\udc80"]
)
def test_settings_come_back(tmp_path: Path, suffix: str, prompt: str) -> None:
    path, parameters = tmp_path / f"picture{suffix}", dataclasses.replace(PARAMETERS, prompt=prompt)
    assert save_new(PICTURE, path, parameters) == path
    assert read_parameters(path) == str(parameters)
    assert parse_parameters(read_parameters(path)).prompt == prompt
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_file_says_that_a_trained_model_made_it(tmp_path: Path, suffix: str) -> None:
    """In the IPTC's words, as XML that can be read."""
    path = tmp_path / f"picture{suffix}"
    save_new(PICTURE, path, PARAMETERS)
    with Image.open(path) as image:
        xmp = image.info.get("xmp") or image.info["XML:com.adobe.xmp"]
    (found,) = [own for own in ET.fromstring(xmp).iter() if own.tag.endswith("}DigitalSourceType")]
    assert found.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_new(PICTURE, tmp_path / name, PARAMETERS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_is_overwritten_unless_told_to(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    assert save_new(PICTURE, path, PARAMETERS).name == "a-1.png"
    assert save_new(PICTURE, path, PARAMETERS).name == "a-2.png"
    assert path.read_bytes() == b"precious"
    assert save_new(PICTURE, path, PARAMETERS, overwrite=True) == path
    assert path.read_bytes() == (tmp_path / "a-1.png").read_bytes()
    assert names(tmp_path) == ["a-1.png", "a-2.png", "a.png"]


def test_pictures_of_one_call_are_numbered_and_pass_over_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    (tmp_path / "a-0.png").touch()
    assert [save_new(PICTURE, path, PARAMETERS, number=number).name for number in range(2)] == ["a-1.png", "a-2.png"]
    taken = [save_new(PICTURE, path, PARAMETERS, number=number, overwrite=True).name for number in range(2)]
    assert taken == ["a-0.png", "a-1.png"]
    assert names(tmp_path) == ["a-0.png", "a-1.png", "a-2.png"]


def test_a_name_that_is_a_link_to_nowhere_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.symlink_to(tmp_path / "nowhere.png")
    assert save_new(PICTURE, path, PARAMETERS).name == "a-1.png"
    assert path.is_symlink() and not (tmp_path / "nowhere.png").exists()
    assert save_new(PICTURE, path, PARAMETERS, overwrite=True) == path
    assert not path.is_symlink()


def test_a_name_that_another_process_takes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "a.png", os.link

    def late(source: Any, target: Any, **options: Any) -> None:
        if target == "a.png":
            path.write_bytes(b"another's")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", late)
    assert save_new(PICTURE, path, PARAMETERS).name == "a-1.png"
    assert path.read_bytes() == b"another's"


@pytest.mark.parametrize("letter", ["a", "ä", "🍎"])
def test_the_longest_names(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * (251 // len(letter.encode())) + ".png")
    for number, taken in enumerate([path.name, "-1.png", "-2.png"]):
        found = save_new(PICTURE, path, PARAMETERS)
        assert found.name.endswith(taken) and found.exists(), number
    assert len(names(tmp_path)) == 3
    with pytest.raises(OutputError, match="is a name of more than 255 bytes; give a shorter one"):
        check_target(tmp_path / ("a" * 252 + ".png"))


def refuse(*codes: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(codes[0], os.strerror(codes[0]))

    return call


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("lacking", [("O_TMPFILE",), ("link",), ("O_TMPFILE", "link"), ("/proc",)])
def test_file_systems_that_lack_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...], overwrite: bool
) -> None:
    opening, linking = os.open, os.link

    def open_(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return opening(path, flags, *mode, **options)

    def link(source: str, target: str, **options: Any) -> None:
        if source.startswith("/proc"):
            raise OSError(errno.ENOENT, "No such file or directory")
        linking(source, target, **options)

    if "O_TMPFILE" in lacking:
        monkeypatch.setattr(os, "open", open_)
    if "link" in lacking:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    if "/proc" in lacking:
        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "a.png"
    assert save_new(PICTURE, path, PARAMETERS, overwrite=overwrite) == path
    assert read_parameters(path) == TEXT
    before = path.stat()
    found = save_new(PICTURE, path, PARAMETERS, overwrite=overwrite)
    assert found.name == ("a.png" if overwrite else "a-1.png")
    assert (path.stat().st_ino == before.st_ino) is not overwrite
    assert read_parameters(found) == TEXT
    assert len(names(tmp_path)) == 1 + (not overwrite)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("nameless", [True, False])
def test_pictures_have_the_mode_of_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int, nameless: bool
) -> None:
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_CREAT | os.O_EXCL)  # of a folder: it exists
    before = os.umask(mask)
    try:
        path = save_new(PICTURE, tmp_path / "a.png", PARAMETERS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("at", ["fsync", "link", "replace"])
@pytest.mark.parametrize("nameless", [True, False])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, nameless: bool) -> None:
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_CREAT | os.O_EXCL)
    monkeypatch.setattr(os, at, refuse(errno.ENOSPC))
    with pytest.raises(OutputError, match="cannot be written: No space left on device; choose another folder"):
        save_new(PICTURE, tmp_path / "a.png", PARAMETERS, overwrite=at == "replace")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_CREAT | os.O_EXCL)
    old, fresh, strange = (tmp_path / f"{new_file.PREFIX}{name}" for name in ("old", "fresh", "strange"))
    for path in (old, fresh, tmp_path / "other"):
        path.touch()
    strange.symlink_to(tmp_path / "other")
    for path in (old, strange, tmp_path / "other"):
        os.utime(path, (0, 0), follow_symlinks=False)
    save_new(PICTURE, tmp_path / "a.png", PARAMETERS)
    assert names(tmp_path) == [fresh.name, strange.name, "a.png", "other"]


def test_bad_targets(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("a.gif", r"valid: \.png, \.jpg, \.jpeg, \.webp"),
        ("no/a.png", "does not exist"),
        ("folder.png", "is a folder; name a picture in it"),
    ):
        with pytest.raises(OutputError, match=message):
            save_new(PICTURE, tmp_path / name, PARAMETERS)


@pytest.mark.parametrize("letter", ["a", "🍎"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_prompt_of_100_000_characters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, letter: str
) -> None:
    path = tmp_path / f"a{suffix}"
    long = dataclasses.replace(PARAMETERS, prompt=letter * 100_000, negative_prompt=letter * 100_000)
    with caplog.at_level(logging.WARNING):
        save_new(PICTURE, path, long)
    lines = read_parameters(path).split("\n")
    kept = len(lines[0])
    assert lines == [letter * kept, f"Negative prompt: {letter * kept}", TEXT.split("\n")[2]]
    if suffix != ".jpg":
        assert (kept, caplog.records) == (100_000, [])
        return
    assert kept > 8000 - 300 * (letter == "🍎")
    message = f"{path} holds the first {kept} characters of the prompt; PNG and WebP hold all"
    assert [record.getMessage() for record in caplog.records] == [message]


def test_settings_that_jpeg_has_no_room_for_lose_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jpg"
    with caplog.at_level(logging.WARNING):
        save_new(PICTURE, path, dataclasses.replace(PARAMETERS, further={"Sigmas": (1 / 3,) * 3000}))
    assert "does not hold its settings: JPEG has no room for so many" in caplog.text
    with Image.open(path) as written:
        assert written.size == (64, 32)
