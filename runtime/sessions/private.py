"""Files that are the user's alone: those of the plan cache, among which there is native code.

One check for reading and for writing, made on what was opened, not on its name: a file belongs to the user or to root,
who may have put it into an image or a read-only mount, nobody else can write to it, and it is no link. The same holds
for the folder; where that lies is the user's own affair, and links on the way there are followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from calotype.runtime.untrusted import open_regular


def check_private(status: os.stat_result, path: Path) -> None:
    """Raises PermissionError where what ``status`` is of belongs to somebody else, or others can write to it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"It belongs to user {status.st_uid}, not to you or root", str(path))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise PermissionError(errno.EPERM, f"Others can write to it: its mode is {mode}", str(path))


def check_folder(folder: Path) -> None:
    """Raises OSError where ``folder`` is no folder, or a link, or not private."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise NotADirectoryError(errno.ENOTDIR, f"It is {what}", str(folder))
    check_private(status, folder)


def open_private(path: Path) -> BufferedReader:
    """Open a private file for reading; raises OSError for any other."""
    try:
        file = open_regular(path, os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "It is a link", str(path)) from None
        raise
    try:
        check_private(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def read_private(path: Path) -> bytes:
    """The contents of a private file; raises OSError for any other."""
    with open_private(path) as file:
        return file.read()


def write_private(path: Path, data: Any) -> None:
    """Write a file that its owner alone reads, whole or not at all; raises OSError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    try:
        with create_private(partial) as file:
            file.write(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def create_private(path: Path) -> Iterator[BufferedWriter]:
    """Write a new file that its owner alone reads; on the disk when the block ends. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
