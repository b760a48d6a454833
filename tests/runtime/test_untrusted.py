"""Files that others wrote: which are opened, how much is read, and what JSON may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.runtime.errors import quoted
from calotype.runtime.untrusted import parse_json, read_bytes, why


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
