"""Weights in a ``.safetensors`` file as numpy arrays (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.untrusted import open_regular, parse_json, why

MAX_HEADER = 16 << 20  # the format allows six times of it, whose tables would take gigabytes; real ones have a tenth
MAX_DIMENSIONS = 32
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
            with open_regular(path) as file:
                self._records, start = _header(file)
                self.metadata: dict[str, str] = _metadata(self._records.pop("__metadata__", {}))
                unknown = sorted({_dtype(name, record) for name, record in self._records.items()} - DTYPES.keys())
                if not unknown:
                    self._data: Array = np.memmap(file, np.uint8, "r")[start:]
                    _check(self._records, self._data.size)
        except FileNotFoundError:
            raise InputError(f"{path} does not exist") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {why(error)}; see that it is a file that you may read") from None
        except ValueError as error:
            raise InputError(f"{path} is not a whole safetensors file: {why(error)}; download it again") from None
        if unknown:
            found = ", ".join(quoted(dtype)[1:-1] for dtype in unknown[:8])
            raise InputError(f"{path} holds weights of the dtype {found}; valid: {', '.join(DTYPES)}")

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


def _header(file: BufferedReader) -> tuple[dict[str, Any], int]:
    """The header's records, and where the tensors begin."""
    start = file.read(8)
    if len(start) < 8:
        raise ValueError("it is cut off")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise ValueError(f"it is cut off, or of another format, or its header has more than {MAX_HEADER >> 20} MiB")
    header = file.read(length)
    if len(header) < length:
        raise ValueError("it is cut off, or of another format")
    records = parse_json(header)
    if not isinstance(records, dict):
        raise ValueError("its header is no table")
    return records, 8 + length


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("its __metadata__ is no table of texts")
    return value


def _dtype(name: str, record: Any) -> str:
    """The dtype of a record that has all that belongs to one, each of its type."""
    match record:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(record) == 3:
            if len(shape) <= MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in (begin, end, *shape)):
                return dtype
    raise ValueError(f"{quoted(name)} has no dtype, shape and place, or a shape that is none")


def _check(records: Mapping[str, Any], size: int) -> None:
    """Each tensor has the bytes that its shape takes, and together they are the whole file, without gap or overlap."""
    position = 0
    for name, record in sorted(records.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = record["data_offsets"]
        width, shape = np.dtype(DTYPES[record["dtype"]]).itemsize, record["shape"]
        # Where one side is nothing, numpy wants the others to be of a size that could be.
        if width * math.prod(max(side, 1) for side in shape) >= 2**63:
            raise ValueError(f"the shape of {quoted(name)} is too large")
        if begin != position or end - begin != width * math.prod(shape):
            raise ValueError(f"the place of {quoted(name)} does not fit its shape")
        position = end
    if position != size:
        raise ValueError(f"it has {size} bytes of weights, {position} expected")
