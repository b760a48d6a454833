"""The small files of a checkpoint: JSON, and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calotype.export.contents import check_whole
from calotype.runtime.errors import CheckpointError
from calotype.runtime.untrusted import read_bytes, why

MOST_BYTES = 64 << 20


def read_small(path: Path) -> bytes:
    """The contents of ``path``, at most ``MOST_BYTES``.

    Raises:
        CheckpointError: when there is no such file, or it cannot be read, is larger, or is no file.
    """
    try:
        return read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder in diffusers' layout has it") from None
    except OSError as error:
        message = f"{path} cannot be read: {why(error)}; see that it is a file that you may read"
        raise CheckpointError(message) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        CheckpointError: when there is no such file, or it holds something else.
    """
    data = read_small(path)
    try:
        value = json.loads(data)
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON: it is nested too deep") from None
    except ValueError as error:  # also a number of more digits than Python reads
        check_whole(path, data[:64])
        raise CheckpointError(f"{path} cannot be read as JSON: {why(error)}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; take the publisher's own")
    return value
