"""TensorRT, its lean runtime and TensorRT-RTX: one API under three module names, imported when one is asked for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import threading
from collections import deque
from typing import Any

from calotype.runtime.errors import BackendError, MissingPackageError
from calotype.runtime.sessions.cuda import Gpu

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

    def check_gpu(self, gpu: Gpu) -> None:
        """Raises BackendError for a GPU that it does not run on, as TensorRT-RTX does not on Hopper."""
        if self.name == "tensorrt-rtx" and not hasattr(self.api.ComputeCapability, gpu.capability.upper()):
            raise BackendError(f"{self.name} {self.version} does not run on {gpu.identity}; use --backend cuda")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Saying:
    """An error, or of what somebody says how many bytes it takes."""

    number: int
    thread: int
    text: str
    size: int | None


@functools.cache
def _logger(api: Any) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]
        """Keeps the latest errors and what builders say of memory; the rest is the library talking to itself.

        All sessions and builds of a process share it, and threads of the library's own speak too: so nothing is
        forgotten at somebody's beginning, who notes a :meth:`mark` instead and is told what came after.
        """

        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self._numbers = itertools.count(1)
            self._latest = 0
            self._said: deque[_Saying] = deque(maxlen=1000)

        def log(self, severity: Any, message: str) -> None:
            text, size = " ".join(message.split()), None
            if severity not in (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR):
                what, _, number = message.removesuffix(" bytes").rpartition(": ")
                if not (what.startswith("Total ") and message.endswith(" bytes") and number.isdecimal()):
                    return
                text, size = what.removeprefix("Total "), int(number)
            self._latest = next(self._numbers)
            self._said.append(_Saying(number=self._latest, thread=threading.get_ident(), text=text, size=size))

        def mark(self) -> int:
            """Where one is now."""
            return self._latest

        def first(self, mark: int) -> str:
            """The first error after ``mark``, from which others follow; one of this thread before one of another."""
            errors = self._after(mark, [item for item in list(self._said) if item.size is None])
            return errors[0].text if errors else "it gives no reason"

        def memory(self, mark: int) -> dict[str, int]:
            """What a builder has said after ``mark``: of what (``Weights Memory``), how many bytes."""
            sizes = self._after(mark, [item for item in list(self._said) if item.size is not None])
            return {item.text: item.size or 0 for item in sizes}

        def _after(self, mark: int, said: list[_Saying]) -> list[_Saying]:
            """What this thread has said, or else what others have."""
            late = [item for item in said if item.number > mark]
            own = threading.get_ident()
            return [item for item in late if item.thread == own] or late

    return Logger()
