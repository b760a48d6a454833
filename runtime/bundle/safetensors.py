"""Weights in a ``.safetensors`` file as numpy arrays (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError

MAX_HEADER = 100_000_000  # of the format itself
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "|b1"}

Array = NDArray[Any]


class SafetensorsFile(Mapping[str, Array]):
    """The tensors of a file by name, mapped into memory and read when they are asked for.

    An array is a read-only view of the file; only bfloat16, which numpy lacks, is widened to a float32 copy.

    Attributes:
        metadata: the file's own remarks, text by name.
    """

    def __init__(self, path: Path) -> None:
        """Check the header; every tensor then lies inside the file.

        Raises:
            InputError: the file is missing, cut off or of another format, or has a dtype that is not a weight's.
        """
        try:
            self._records, start = _header(path)
            self.metadata: dict[str, str] = dict(self._records.pop("__metadata__", {}))
            unknown = sorted({str(record["dtype"]) for record in self._records.values()} - DTYPES.keys())
            if not unknown:
                self._data: Array = np.memmap(path, np.uint8, "r")[start:]
                _check(self._records, self._data.size)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} is not a whole safetensors file: {why}; download it again") from None
        if unknown:
            raise InputError(f"{path} holds weights of the dtype {', '.join(unknown)}; valid: {', '.join(DTYPES)}")

    def __getitem__(self, name: str) -> Array:
        record = self._records[name]
        begin, end = record["data_offsets"]
        array = self._data[begin:end].view(DTYPES[record["dtype"]]).reshape(record["shape"])
        if record["dtype"] == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        return tuple(self._records[name]["shape"])


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's records, and where the tensors begin."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is cut off")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER or length > path.stat().st_size - 8:
            raise ValueError("it is cut off, or of another format")
        records = json.loads(file.read(length))
    if not isinstance(records, dict):
        raise ValueError("its header is no table")
    return records, 8 + length


def _check(records: Mapping[str, Any], size: int) -> None:
    """Each tensor has the bytes that its shape takes, and together they are the whole file, without gap or overlap."""
    position = 0
    for name, record in sorted(records.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = record["data_offsets"]
        width, shape = np.dtype(DTYPES[record["dtype"]]).itemsize, record["shape"]
        whole = all(isinstance(size, int) and size >= 0 for size in (begin, *shape))
        if not whole or begin != position or end - begin != width * math.prod(shape):
            raise ValueError(f"the place of {name} does not fit its shape")
        position = end
    if position != size:
        raise ValueError(f"it has {size} bytes of weights, {position} expected")
