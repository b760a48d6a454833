"""What Calotype takes, beside its peers and by itself: programs that are run as ``python -m benchmarks.NAME``."""

from __future__ import annotations

import sys
from types import TracebackType


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line which package is missing and how to get it, or what Calotype says of itself.

    Any other error keeps its traceback.
    """
    if any(each.__name__ == "CalotypeError" for each in kind.__mro__):  # whose class may not be there to be imported
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError):
        print(
            f"error: {error.name} is not installed for {sys.executable}; in a clone, `make bench` installs what the "
            "benchmarks need, and .venv/bin/python runs them",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # so it is while the program is looked for, and only then
    sys.excepthook = explain
