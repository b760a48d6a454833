"""A bundle in the making: a folder beside its place, which holds what is finished until it takes that place.

Its place may be a folder that others write to. So the one beside it is this user's alone, is never a link, and nothing
is removed but through the handle that it was opened by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calotype.runtime.bundle.manifest import MANIFEST_NAME, MOST_BYTES, FileRecord
from calotype.runtime.errors import ExportError
from calotype.runtime.locks import lock
from calotype.runtime.untrusted import open_regular

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What a rename fails with where its target is something else than an empty folder.
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


class PartialBundle:
    """``.NAME.partial``, locked while it is open.

    It outlives an interrupt and a kill, and the next export of the same weights goes on from there; any other error
    removes it, unless the bundle is finished and only its place is taken.
    """

    def __init__(self, bundle: Path, *, replace: bool = False) -> None:
        self.bundle, self.folder = bundle, bundle.with_name(f".{bundle.name}.partial")
        self._replace, self._replaced = replace, f".{bundle.name}.replaced"
        self._finished: dict[str, Any] = {}
        self._keep = False

    def __enter__(self) -> Self:
        """Lock; raises ExportError where another export of the same bundle runs, or the folder is not this user's."""
        self.bundle.parent.mkdir(parents=True, exist_ok=True)
        self._parent = os.open(self.bundle.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._handle = self._open()
        except BaseException:
            os.close(self._parent)
            raise
        try:
            self._lock()
            self._restore()
            self._finished = self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._keep:
            with contextlib.suppress(OSError):
                self._empty(keep=())
                os.rmdir(self.folder.name, dir_fd=self._parent)
        self._close()

    def take_up(self, component: str, key: str) -> Mapping[str, Any] | None:
        """What :meth:`finish` was told of ``component``, if it was made under the same ``key`` and lies there whole."""
        found = self._finished.get(component)
        if found is None or found["key"] != key or not all(self._is_whole(*item) for item in found["files"].items()):
            return None
        record: Mapping[str, Any] = found["record"]
        return record

    def finish(self, component: str, key: str, files: Iterable[str], record: Mapping[str, Any]) -> None:
        """Note that ``component``, made of what ``key`` stands for, is complete in ``files``."""
        records = {name: dataclasses.asdict(FileRecord.of(self.folder / name)) for name in files}
        self._finished[component] = {"key": key, "files": records, "record": record}
        self._note()

    def files(self) -> dict[str, FileRecord]:
        """Every file of every finished component."""
        found = {
            name: FileRecord(**record) for item in self._finished.values() for name, record in item["files"].items()
        }
        return dict(sorted(found.items()))

    def publish(self, manifest: str) -> None:
        """Write the manifest, drop what it does not name, and take the bundle's place, whole.

        Raises:
            ExportError: something else has the place by now; what is finished stays.
        """
        self._empty(keep=self.files())
        self._write(MANIFEST_NAME, manifest)
        mode = self._open_to_others()
        if not os.path.samestat(os.fstat(self._handle), os.stat(self.folder.name, dir_fd=self._parent)):
            raise ExportError(f"{self.folder} was exchanged by somebody else meanwhile; choose another folder")
        moved = self._replace and self._move_away()
        try:
            self._rename(self.folder.name, self.bundle.name)
        except BaseException as error:
            if moved:
                self._rename(self._replaced, self.bundle.name)
            if isinstance(error, OSError) and error.errno in TAKEN:
                raise self._taken() from error
            raise
        os.fchmod(self._handle, mode | mode >> 2 & 0o111)
        self._remove(self._replaced)

    def _open(self) -> int:
        """A handle of the folder, which is made if it is not there, and then is this user's alone."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder.name, 0o700, dir_fd=self._parent)
        try:
            handle = os.open(self.folder.name, FOLDER, dir_fd=self._parent)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise ExportError(f"{self.folder} is in the way: it is no folder; remove it, or choose another") from None
        found = os.fstat(handle)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            os.close(handle)
            raise ExportError(
                f"{self.folder} is in the way: others than you can write there; remove it, or choose another folder"
            )
        os.fchmod(handle, 0o700)
        return handle

    def _lock(self) -> None:
        try:
            locked = lock(self._handle, wait=False)
        except BlockingIOError:
            raise ExportError(
                f"another export is writing {self.bundle}; wait for it, or choose another folder"
            ) from None
        if not locked:
            logger.warning("%s lies on a file system without locks; run no other export of it meanwhile", self.bundle)

    def _restore(self) -> None:
        """Put the bundle back that an export was about to replace when it was killed, between its two renames."""
        found = self._stat(self._replaced)
        if found is None:
            return
        if found.st_uid != os.geteuid():
            raise ExportError(f"{self.bundle.with_name(self._replaced)} is in the way; choose another folder")
        if stat.S_ISDIR(found.st_mode) and self._stat(self.bundle.name) is None:
            self._rename(self._replaced, self.bundle.name)
        self._remove(self._replaced)

    def _move_away(self) -> bool:
        """Whether a bundle was in the place; raises ExportError where something else is, which stays there."""
        if self._stat(self.bundle.name) is None:
            return False
        self._rename(self.bundle.name, self._replaced)
        if not (self.bundle.with_name(self._replaced) / MANIFEST_NAME).is_file():
            self._rename(self._replaced, self.bundle.name)
            raise self._taken()
        return True

    def _taken(self) -> ExportError:
        self._keep = True
        with contextlib.suppress(OSError):
            os.unlink(MANIFEST_NAME, dir_fd=self._handle)
            self._note()
        return ExportError(
            f"{self.bundle} was made by somebody else meanwhile; remove it and run this again, which goes on from "
            f"what is finished, or use --force to replace a bundle"
        )

    def _note(self) -> None:
        beside = f"{FINISHED}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=self._handle)
        self._write(beside, json.dumps(self._finished))
        os.rename(beside, FINISHED, src_dir_fd=self._handle, dst_dir_fd=self._handle)

    def _stat(self, name: str) -> os.stat_result | None:
        """Of what lies beside the bundle, a link itself and not where it leads."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self._parent, follow_symlinks=False)
        return None

    def _rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._parent, dst_dir_fd=self._parent)

    def _remove(self, name: str) -> None:
        """A folder with all that is in it, or a link alone."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._parent)
        shutil.rmtree(name, ignore_errors=True, dir_fd=self._parent)

    def _empty(self, keep: Iterable[str]) -> None:
        """Remove all files of the folder but ``keep``, and the folders in it that are empty then."""
        kept = set(keep)
        for place, folders, files, handle in os.fwalk(".", topdown=False, dir_fd=self._handle):
            for name in files:
                if str(Path(place, name)) not in kept:
                    os.unlink(name, dir_fd=handle)
            for name in folders:
                try:
                    os.rmdir(name, dir_fd=handle)
                except NotADirectoryError:  # a link to a folder
                    os.unlink(name, dir_fd=handle)
                except OSError:  # one that is not empty
                    continue

    def _open_to_others(self) -> int:
        """Give every file the mode that the manifest has, which is that of new files, and return it."""
        mode = stat.S_IMODE(os.stat(MANIFEST_NAME, dir_fd=self._handle).st_mode)
        for _, folders, files, handle in os.fwalk(".", dir_fd=self._handle):
            for name in files:
                os.chmod(name, mode, dir_fd=handle)
            for name in folders:
                os.chmod(name, mode | mode >> 2 & 0o111, dir_fd=handle)
        return mode

    def _write(self, name: str, text: str) -> None:
        with open(os.open(name, NEW_FILE, 0o666, dir_fd=self._handle), "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)

    def _close(self) -> None:
        os.close(self._handle)
        os.close(self._parent)

    def _read(self) -> dict[str, Any]:
        try:
            with open_regular(Path(FINISHED), os.O_NOFOLLOW, self._handle) as file:
                found = json.loads(file.read(MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_whole(self, name: str, record: Mapping[str, Any]) -> bool:
        path = self.folder / name
        return path.is_file() and FileRecord.of(path) == FileRecord(**record)
