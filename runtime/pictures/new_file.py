"""A file that appears under a name whole or not at all, and only under one that is free."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from pathlib import Path

from calotype.runtime.closing import Closing

PREFIX = ".calotype-"
# Of a file that a killed process left behind.
STALE = 24 * 3600.0
# What linking fails with where there are no links, or no /proc that leads to a file without a name.
WITHOUT_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT, errno.EXDEV, errno.EMLINK, errno.EINVAL}
PRIVATE_FLAGS = os.O_WRONLY | os.O_CLOEXEC


class NewFile(Closing):
    """Bytes on the disk of a folder, to be given a name there.

    Until then they have none, and are gone when the process is, killed or not. Where the file system has no such files
    they are hidden ones; those that a killed process left are removed a day later. Raises OSError.
    """

    def __init__(self, folder: Path, data: bytes) -> None:
        self._data = data
        self._hidden: str | None = None
        self._nameless: int | None = None
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                self._nameless = os.open(folder, os.O_TMPFILE | PRIVATE_FLAGS, 0o666)
            except OSError:
                self._hide()
            else:
                _write(self._nameless, data)
        except BaseException:
            self.close()
            raise

    def take(self, name: str, *, overwrite: bool = False) -> bool:
        """Be called ``name`` from now on; False where it is taken, unless ``overwrite`` replaces what is there."""
        if overwrite:
            self._replace(name)
            return True
        for link in (self._link_nameless, self._link_hidden):
            try:
                link(name)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in WITHOUT_LINKS:
                    raise
            else:
                return True
        return self._reserve(name)

    def close(self) -> None:
        """Forget the bytes that have no name of their own."""
        if self._hidden is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._hidden, dir_fd=self._folder)
        if self._nameless is not None:
            os.close(self._nameless)
        os.close(self._folder)

    def _link_nameless(self, name: str) -> None:
        if self._nameless is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        os.link(f"/proc/self/fd/{self._nameless}", name, dst_dir_fd=self._folder, follow_symlinks=True)

    def _link_hidden(self, name: str) -> None:
        os.link(self._hide(), name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=False)

    def _reserve(self, name: str) -> bool:
        """Take the name with an empty file first: FAT, exFAT and some network folders have no links."""
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | PRIVATE_FLAGS, 0o666, dir_fd=self._folder))
        except FileExistsError:
            return False
        try:
            self._replace(name)
        except BaseException:
            os.unlink(name, dir_fd=self._folder)
            raise
        return True

    def _replace(self, name: str) -> None:
        if self._hidden is None and self._nameless is not None:
            hidden = _hidden_name()
            with contextlib.suppress(OSError):
                self._link_nameless(hidden)
                self._hidden = hidden
        os.replace(self._hide(), name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._hidden = None

    def _hide(self) -> str:
        """The name of the hidden file, which is written when it is first needed."""
        if self._hidden is None:
            self._remove_stale()
            name = _hidden_name()
            file = os.open(name, os.O_CREAT | os.O_EXCL | PRIVATE_FLAGS, 0o666, dir_fd=self._folder)
            self._hidden = name
            try:
                _write(file, self._data)
            finally:
                os.close(file)
        return self._hidden

    def _remove_stale(self) -> None:
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/self/fd/{self._folder}").glob(f"{PREFIX}*"):
                found = path.lstat()
                old = time.time() - found.st_mtime > STALE
                if old and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    path.unlink()


def _hidden_name() -> str:
    return PREFIX + secrets.token_hex(8)


def _write(file: int, data: bytes) -> None:
    with open(file, "wb", closefd=False) as stream:
        stream.write(data)
    os.fsync(file)
