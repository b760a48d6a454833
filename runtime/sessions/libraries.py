"""TensorRT, its lean runtime and TensorRT-RTX: one API under three module names, imported when one is asked for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

from calotype.runtime.errors import BackendError, MissingPackageError

# Backend -> modules; the lean runtime executes version-compatible plans and builds none.
MODULES = {"tensorrt": ("tensorrt", "tensorrt_lean"), "tensorrt-rtx": ("tensorrt_rtx",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """An imported library, and the one logger that it ever gets: it ignores a second."""

    name: str
    api: Any
    version: str
    logger: Any

    @property
    def builds(self) -> bool:
        """Whether it builds plans: the lean runtime does not."""
        return hasattr(self.api, "Builder")


def installed(name: str) -> bool:
    """Whether a module of the backend ``name`` is there; nothing is imported."""
    return any(importlib.util.find_spec(module) is not None for module in MODULES[name])


def load_library(name: str) -> Library:
    """Import the library of the backend ``name``, the full one where there are two.

    Raises:
        BackendError: there is no backend of that name.
        MissingPackageError: none of its packages is installed.
    """
    if name not in MODULES:
        raise BackendError(f"there is no builder {name!r}; valid: {', '.join(MODULES)}")
    missing: ImportError | None = None
    for module in MODULES[name]:
        try:
            api = importlib.import_module(module)
        except ImportError as error:
            missing = missing or error
            continue
        return Library(name=name, api=api, version=str(api.__version__), logger=_logger(api))
    raise MissingPackageError(MODULES[name][0], name) from missing


@functools.cache
def _logger(api: Any) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]
        """Keeps errors and what the builder says of memory; the rest is the library talking to itself."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []
            self.memory: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            elif message.startswith("Total ") and message.endswith(" bytes"):
                what, _, size = message.removesuffix(" bytes").rpartition(": ")
                if size.isdecimal():
                    self.memory[what.removeprefix("Total ")] = int(size)

        def clear(self) -> None:
            """Forget what was said before the next piece of work."""
            self.errors.clear()
            self.memory.clear()

        def first(self) -> str:
            """The first error, from which the others follow."""
            return self.errors[0] if self.errors else "it gives no reason"

    return Logger()
