"""The JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calotype.export.contents import check_whole
from calotype.runtime.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        CheckpointError: when there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder in diffusers' layout has it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        check_whole(path, path.read_bytes()[:64])
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; take the publisher's own")
    return value
