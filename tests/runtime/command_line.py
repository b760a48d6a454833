"""The command line within this process: a start of one's own is kept for what only a process can show."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator
from pathlib import Path

from calotype.runtime.cli.main import run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a process would have left, by the names of ``subprocess.CompletedProcess``."""

    returncode: int
    stdout: str
    stderr: str


def calotype(*arguments: str | Path, cwd: Path | None = None) -> Ran:
    """Run ``calotype`` with the arguments, in the folder ``cwd`` where one is given."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(no_logging_yet())
        code = run([str(argument) for argument in arguments])
    return Ran(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@contextlib.contextmanager
def no_logging_yet() -> Iterator[None]:
    """The root logger as a process finds it, so that the command line sets it up; as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
