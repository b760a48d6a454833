"""What Calotype notes in the graph of an engine, as text under a name of ours."""

from __future__ import annotations

import base64
import binascii
import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.graphs.protobuf import fields

LAYOUTS = "calotype.layouts"  # see :mod:`calotype.runtime.graphs.layouts`
PROBE = "calotype.probe"  # inputs that the network met when the engine was calibrated
Inputs = Mapping[str, NDArray[Any]]


def read_remark(model: bytes, name: str) -> bytes | None:
    """The text that the ONNX file ``model`` carries under ``name``; None where it has none.

    Raises:
        ValueError: it is damaged.
    """
    entries = [dict(_entry(entry)) for number, _, entry in fields(memoryview(model)) if number == 14]
    return next((entry[2] for entry in entries if entry.get(1) == name.encode()), None)


def write_inputs(inputs: Inputs) -> str:
    """Inputs of a network as text."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **inputs)
    return base64.b64encode(file.getvalue()).decode()


def read_inputs(text: bytes) -> Inputs:
    """What :func:`write_inputs` made.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (binascii.Error, zipfile.BadZipFile, EOFError, KeyError, OSError) as error:
        raise ValueError(f"its inputs are damaged: {error}") from None


def _entry(message: Any) -> list[tuple[int, bytes]]:
    return [(number, bytes(value)) for number, _, value in fields(message) if isinstance(value, memoryview)]
