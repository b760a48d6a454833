"""The reader of safetensors files, against the safetensors package, and files that are not what they claim."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
        ({"a": {**RECORD, "shape": [3]}}, "the place of a does not fit its shape"),
        ({"a": {**RECORD, "shape": [-1, -2]}}, "the place of a does not fit its shape"),
        ({"a": {**RECORD, "shape": [2.0]}}, "the place of a does not fit its shape"),
        ({"a": RECORD, "__metadata__": 3}, "is not a whole safetensors file"),
        (b"[" * 100_000, "is not a whole safetensors file"),
        ({"a": {**RECORD, "data_offsets": [-8, 0]}}, "the place of a does not fit its shape"),
        ({"a": {**RECORD, "data_offsets": [8, 16]}}, "the place of a does not fit its shape"),
        ({"a": RECORD, "b": RECORD}, "the place of b does not fit its shape"),
    ],
)
def test_a_broken_header_is_one_line(tmp_path: Path, header: Any, message: str) -> None:
    refused(write(tmp_path / "a.safetensors", header, bytes(8)), message)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", "nothing.safetensors does not exist")
    refused(tmp_path, "Is a directory")
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip, as .pt files are")
    refused(tmp_path / "a.safetensors", "cut off, or of another format")


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)
