"""The reader of safetensors files, against the safetensors package, and files that are not what they claim."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file

from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import InputError

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "single": torch.randn(2, 1, 4),
    "brain": torch.randn(7, 3).bfloat16(),
    "scalar": torch.tensor(4.0),
    "empty": torch.zeros(0, 3),
    "whole": torch.arange(6),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", {"author": "me"})
    return tmp_path / "a.safetensors"


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_the_package_wrote(path: Path) -> None:
    file = SafetensorsFile(path)
    assert set(file) == TENSORS.keys()
    assert file.metadata == {"author": "me"}
    for name, tensor in TENSORS.items():
        expected = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert file[name].dtype == expected.dtype
        assert file.shape(name) == tuple(tensor.shape)
        np.testing.assert_array_equal(file[name], expected)


def test_a_tensor_is_a_view_that_cannot_be_written_to(path: Path) -> None:
    half = SafetensorsFile(path)["half"]
    assert not half.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        half[:] = 0


def test_every_truncation_is_one_line(path: Path) -> None:
    data = path.read_bytes()
    for length in (0, 7, 8, 50, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "is not a whole safetensors file: .*; download it again")
    path.write_bytes(data + b"\0")
    refused(path, r"bytes of weights, \d+ expected")


NO_RECORD = "'a' has no dtype, shape and place, or a shape that is none; download it again"
RECORD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "is not a whole safetensors file"),
        (b"\xff\xfe", "is not a whole safetensors file"),
        ([], "its header is no table"),
        ({"a": 1}, "is not a whole safetensors file"),
        ({"a": {"dtype": "F32"}}, "is not a whole safetensors file"),
        ({"a": {**RECORD, "dtype": "F8_E4M3"}}, "holds weights of the dtype F8_E4M3; valid: F64, F32, F16, BF16"),
        ({"a": {**RECORD, "shape": [3]}}, "the place of 'a' does not fit its shape"),
        ({"a": {**RECORD, "shape": [-1, -2]}}, NO_RECORD),
        ({"a": {**RECORD, "shape": [2.0]}}, NO_RECORD),
        ({"a": RECORD, "__metadata__": 3}, "is not a whole safetensors file"),
        (b"[" * 100_000, "is not a whole safetensors file"),
        ({"a": {**RECORD, "data_offsets": [-8, 0]}}, NO_RECORD),
        ({"a": {**RECORD, "data_offsets": [8, 16]}}, "the place of 'a' does not fit its shape"),
        ({"a": RECORD, "b": RECORD}, "the place of 'b' does not fit its shape"),
        ({"a": {**RECORD, "data_offsets": [0.0, 8.0]}}, NO_RECORD),
        ({"a": {**RECORD, "data_offsets": [False, 8]}}, NO_RECORD),
        ({"a": {**RECORD, "shape": [True, 2]}}, NO_RECORD),
        ({"a": {**RECORD, "shape": [2] + [1] * 64}}, NO_RECORD),
        ({"a": {**RECORD, "shape": "2"}}, NO_RECORD),
        ({"a": {**RECORD, "dtype": ["F32"]}}, NO_RECORD),
        ({"a": {**RECORD, "more": 1}}, NO_RECORD),
        ({"a": {**RECORD, "shape": [0, 2**62], "data_offsets": [0, 0]}}, "the shape of 'a' is too large"),
        ({"a": {**RECORD, "shape": [0, 10**30], "data_offsets": [0, 0]}}, "a whole number of 31 digits"),
        ({"a": RECORD, "__metadata__": {"author": 3}}, "its __metadata__ is no table of texts"),
        ({"a\x1b[2J" * 100: {**RECORD, "shape": []}}, "the place of "),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"1" * 5000 + b"]}}", "of 5000 digits"),
        (b'{"a": 1, "a": 2}', "it has 'a' twice"),
        (b" " * (17 << 20), "its header has more than 16 MiB"),
    ],
)
def test_a_broken_header_is_one_line(tmp_path: Path, header: Any, message: str) -> None:
    refused(write(tmp_path / "a.safetensors", header, bytes(8)), message)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", "nothing.safetensors does not exist")
    refused(tmp_path, "Is a directory")
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip, as .pt files are")
    refused(tmp_path / "a.safetensors", "cut off, or of another format")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "It is a pipe, a device or a socket, not a file")
    refused(Path("/dev/zero"), "It is a pipe, a device or a socket, not a file")


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    one_line(caught.value)


def one_line(error: Exception) -> None:
    text = str(error)
    assert text.isprintable() and len(text) < 600


SIZES = st.sampled_from([0, 1, 2, 8, 16, -1, 2**31, 2**62, 2**64, 1.5, True, None, "2"])
RECORDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "BOOL", "f32", 4, None, ["F32"]]),
        "shape": st.lists(SIZES, max_size=70) | SIZES,
        "data_offsets": st.lists(SIZES, max_size=3) | SIZES,
    },
    optional={"extra": SIZES},
)
SOUND = st.integers(0, 4).map(lambda size: {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]})
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), RECORDS | SOUND | SIZES, max_size=3)


def survives(path: Path, header: bytes, data: bytes) -> None:
    """Reading is tensors, of which every one can be read, or one line; and what is read, safetensors reads the same."""
    write(path, header, data)
    try:
        file = SafetensorsFile(path)
    except InputError as error:
        one_line(error)
        return
    arrays = {name: np.array(file[name]) for name in file}
    if not any(file._records[name]["dtype"] == "BF16" for name in file):
        found = load_file(path)
        assert found.keys() == arrays.keys()
        assert all(found[name].shape == arrays[name].shape for name in found)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=HEADERS, data=st.sampled_from([b"", bytes(4), bytes(8), bytes(16)]))
def test_any_header_is_read_or_refused_in_one_line(tmp_path: Path, header: Any, data: bytes) -> None:
    survives(tmp_path / "a.safetensors", json.dumps(header).encode(), data)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_sound_file_with_another_byte(path: Path, place: int, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    other = path.with_name("other.safetensors")
    other.write_bytes(data)
    try:
        file = SafetensorsFile(other)
        assert {name: file[name] for name in file}
    except InputError as error:
        one_line(error)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=HEADERS.map(lambda header: json.dumps(header).encode()) | st.binary(), data=st.binary(max_size=16))
def test_very_many_headers(tmp_path: Path, header: bytes, data: bytes) -> None:
    survives(tmp_path / "a.safetensors", header, data)
