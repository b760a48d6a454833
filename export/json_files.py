"""The JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calotype.export.contents import check_whole
from calotype.runtime.errors import CheckpointError
from calotype.runtime.untrusted import read_bytes, why

MOST_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        CheckpointError: when there is no such file, or it holds something else.
    """
    try:
        data = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder in diffusers' layout has it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}; check its permissions") from error
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
