"""Plans kept on disk: native code, so they lie in the user's own folder and are checked before they are handed out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calotype.runtime.errors import BuildError
from calotype.runtime.manifest import FileRecord

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The sidecar of a plan: what it was made from (``key``), what it takes (``tensors``), its size and sha256."""

    key: Mapping[str, Any]
    tensors: Mapping[str, Any]
    size: int
    sha256: str


def cache_folder() -> Path:
    """``$CALOTYPE_CACHE``, else ``calotype`` in the user's cache folder, then ``plans``; made with mode 0700.

    Raises:
        BuildError: it cannot be made, or belongs to somebody else.
    """
    base = os.environ.get("CALOTYPE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = (Path(base) if base else Path(home).expanduser() / "calotype") / "plans"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise BuildError(f"{folder} belongs to another user; set CALOTYPE_CACHE to a folder of your own")
        folder.chmod(0o700)
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be made: {error.strerror}; set CALOTYPE_CACHE to a folder that can be written"
        ) from error
    return folder


def plan_path(key: Mapping[str, Any]) -> Path:
    """Where the plan of ``key`` lies, built or not."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{_stem(key)}.{digest[:32]}.plan"


def obtain(key: Mapping[str, Any], build: Callable[[], tuple[Any, Mapping[str, Any]]], say: Say) -> Path:
    """The plan of ``key``, built by ``build() -> (bytes, tensors)`` unless a sound one is there.

    One process builds, others wait for it. A plan appears whole or not at all; its record comes last, and a plan
    without a record, or with another sha256 than the record's, is built again.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = plan_path(key)
    with _lock(path, say):
        trouble = _trouble(path)
        if trouble is None:
            say(f"{path.name}: taken from the cache")
            return path
        say(f"{_stem(key)}: {trouble if path.exists() else _changes(key)}")
        data, tensors = build()
        _sidecar(path).unlink(missing_ok=True)
        try:
            _write(path, data)
            record = PlanRecord(key=key, tensors=tensors, **dataclasses.asdict(FileRecord.of(path)))
            _write(_sidecar(path), json.dumps(dataclasses.asdict(record), indent=2).encode())
        except OSError as error:
            raise BuildError(
                f"{path} cannot be written: {error.strerror}; free some space or set CALOTYPE_CACHE"
            ) from error
    return path


def describe_plan(path: Path) -> PlanRecord:
    """What the record beside the plan ``path`` says, after the plan's sha256 was checked; nothing is deserialized.

    Raises:
        BuildError: there is no plan or record, or they do not belong together.
    """
    trouble = _trouble(path)
    if trouble is not None:
        raise BuildError(f"{path}: {trouble}; build it again with: calotype build")
    return PlanRecord(**json.loads(_sidecar(path).read_text()))


def list_plans() -> list[Path]:
    """Every plan of the cache, by name; unsound ones too."""
    return sorted(cache_folder().glob("*.plan"))


def clean_plans() -> int:
    """Remove all plans that nobody is building now; returns the bytes freed."""
    freed = 0
    for path in sorted(cache_folder().iterdir()):
        if path.suffix in (".lock", ".json"):
            continue
        plan = path.with_suffix("") if path.suffix == ".partial" else path
        plan = plan.with_suffix("") if plan.suffix == ".json" else plan
        with contextlib.suppress(BlockingIOError), _lock(plan, None):
            for item in (plan, _sidecar(plan), *(_partial(part) for part in (plan, _sidecar(plan)))):
                with contextlib.suppress(FileNotFoundError):
                    freed += item.stat().st_size
                    item.unlink()
    return freed


def _stem(key: Mapping[str, Any]) -> str:
    parts = (str(key["bundle"]), str(key["network"]), str(key["backend"]))
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _trouble(path: Path) -> str | None:
    """Why the plan cannot be used; None when it can."""
    if not path.is_file():
        return "there is no such plan"
    try:
        record = PlanRecord(**json.loads(_sidecar(path).read_text()))
    except (OSError, ValueError, TypeError):
        return "its record is missing or cannot be read"
    if FileRecord.of(path) != FileRecord(size=record.size, sha256=record.sha256):
        return "its sha256 is not the recorded one"
    return None


def _changes(key: Mapping[str, Any]) -> str:
    """What tells ``key`` from the latest plan of the same network."""
    others = sorted(cache_folder().glob(f"{_stem(key)}.*.plan.json"), key=lambda path: path.stat().st_mtime)
    for other in reversed(others):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            old = json.loads(other.read_text())["key"]
            names = sorted(name for name in key.keys() | old.keys() if key.get(name) != old.get(name))
            return f"built again, since these changed: {', '.join(names)}"
    return "not built before"


@contextlib.contextmanager
def _lock(path: Path, say: Say | None) -> Iterator[None]:
    """Hold the lock of one plan; ``say`` None does not wait but raises BlockingIOError.

    The lock file stays: removing it would let two holders lock two files of one name.
    """
    with path.with_name(path.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say is None:
                raise
            say(f"{path.name}: waiting for another process that builds it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: Any) -> None:
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
