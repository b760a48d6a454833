"""Importing ONNX Runtime, which else reports on its use."""

from __future__ import annotations

import importlib
import os
from typing import Any

from calotype.runtime.errors import MissingPackageError

# Unless told not to by this, it keeps a device id and a database in the user's cache folder, and looks a host up. Who
# wants that sets it to 0.
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime(package: str, extra: str) -> Any:
    """The module ``onnxruntime``, without its telemetry, which is decided when it is first imported.

    Raises:
        MissingPackageError: it is not installed; ``extra`` brings ``package``, which has it.
    """
    chosen = os.environ.get(TELEMETRY_OFF)
    os.environ[TELEMETRY_OFF] = "1" if chosen is None else chosen
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise MissingPackageError(package, extra) from error
    finally:
        if chosen is None:
            os.environ.pop(TELEMETRY_OFF, None)
