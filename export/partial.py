"""A bundle in the making: a folder beside its place, which holds what is finished until it takes that place."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calotype.runtime.bundle.manifest import MANIFEST_NAME, FileRecord
from calotype.runtime.errors import ExportError

FINISHED = "finished.json"


class PartialBundle:
    """``.NAME.partial``, locked while it is open.

    It outlives an interrupt and a kill, and the next export of the same weights goes on from there; any other error
    removes it.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.folder = bundle, bundle.with_name(f".{bundle.name}.partial")
        self._replaced = bundle.with_name(f".{bundle.name}.replaced")
        self._finished: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Lock; raises ExportError where another export of the same bundle runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ExportError(
                f"another export is writing {self.bundle}; wait for it, or choose another folder"
            ) from None
        # An export was killed between the two renames of publish().
        if self._replaced.exists() and not self.bundle.exists():
            self._replaced.rename(self.bundle)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._finished = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

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
        beside = self.folder / f"{FINISHED}.new"
        beside.write_text(json.dumps(self._finished), encoding="utf-8")
        beside.rename(self.folder / FINISHED)

    def files(self) -> dict[str, FileRecord]:
        """Every file of every finished component."""
        found = {
            name: FileRecord(**record) for item in self._finished.values() for name, record in item["files"].items()
        }
        return dict(sorted(found.items()))

    def publish(self, manifest: str) -> None:
        """Write the manifest, drop what it does not name, and take the bundle's place, whole."""
        keep = {self.folder / name for name in self.files()}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in keep:
                path.unlink()
        (self.folder / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
        if self.bundle.exists():
            self.bundle.rename(self._replaced)
        try:
            self.folder.rename(self.bundle)
        except BaseException:
            if self._replaced.exists():
                self._replaced.rename(self.bundle)
            raise
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_whole(self, name: str, record: Mapping[str, Any]) -> bool:
        path = self.folder / name
        return path.is_file() and FileRecord.of(path) == FileRecord(**record)
