"""Files that others wrote: which are opened, how much is read, and what JSON may hold."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.runtime.errors import quoted
from calotype.runtime.untrusted import MOST_CONTENTS, parse_json, read_bytes, why, zip_trouble


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "It is a pipe, a device or a socket, not a file"),
        (Path("/dev/zero"), "It is a pipe, a device or a socket, not a file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "nothing", "No such file or directory"),
    ):
        with pytest.raises(OSError) as caught:
            read_bytes(path, 10)
        assert why(caught.value) == message
        assert caught.value.filename == str(path)


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    assert read_bytes(tmp_path / "a", 11) == bytes(11)
    with pytest.raises(OSError, match="It is larger than"):
        read_bytes(tmp_path / "a", 10)


def test_a_file_that_does_not_say_how_long_it_is() -> None:
    """Those of /proc say that they are empty, as a file does that grows from then on."""
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("no such files here")
    assert path.stat().st_size == 0 and len(read_bytes(path, 10**6)) > 100
    with pytest.raises(OSError, match="It is larger than"):
        read_bytes(path, 100)


def test_a_zip_file_whose_list_of_contents_has_no_end(tmp_path: Path) -> None:
    """It is read whole, and each of its entries of 50 bytes takes 1,000."""
    length = MOST_CONTENTS + 100
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, length, 30, 0)
    with (tmp_path / "a.ckpt").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(30 + length)
        file.write(end)
    assert zip_trouble(tmp_path / "a.ckpt") == (
        "is a zip file that is not read: its list of contents has more than 16 MiB; fetch the weights as .safetensors"
    )


@pytest.mark.parametrize(
    ("method", "said"), [(zipfile.ZIP_DEFLATED, "holds packed tensors"), (zipfile.ZIP_STORED, None)]
)
def test_packed_tensors_are_not_unpacked(tmp_path: Path, method: int, said: str | None) -> None:
    """A few kilobytes of them can be gigabytes, and PyTorch unpacks them at once."""
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", method) as file:
        file.writestr("archive/data.pkl", bytes(1000))
    found = zip_trouble(tmp_path / "a.ckpt")
    assert found is None if said is None else (found or "").startswith(said)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(), st.lists))
def test_json_is_read_as_the_library_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@settings(max_examples=200)
@given(st.binary(max_size=30) | st.text(alphabet='[]{}",:0123456789.eE+-truefalsn\\u ', max_size=40).map(str.encode))
def test_any_text_is_a_value_or_a_line(data: bytes) -> None:
    try:
        parse_json(data)
    except ValueError as error:
        assert why(error).isprintable() and len(why(error)) <= 200


def test_what_is_quoted_is_bounded() -> None:
    for value in ("x" * 10**6, ["x" * 1000] * 1000, {"a": [[[[1]]]]}, "a\nb\x1b[2J", 10**5000):
        assert len(quoted(value)) < 500 and quoted(value).isprintable()
