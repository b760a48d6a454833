"""The plan cache's writing side: one builder at a time, and a plan appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.errors import BuildError
from calotype.runtime.locks import lock
from calotype.runtime.sessions.plans import cache_folder, plan_trouble, read_record, sidecar, weights_of
from calotype.runtime.sessions.private import read_private, write_private
from calotype.runtime.sessions.records import PlanRecord, WeightsRecord
from calotype.runtime.untrusted import why

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A fresh plan, an object with the buffer protocol or a file in the cache, and what its record says of it.

    ``weights``: a file in the cache, to be moved beside the plan; None where there is none.
    """

    plan: Any
    tensors: Mapping[str, Any]
    figures: Mapping[str, float]
    weights: Path | None = None


def plan_path(key: Mapping[str, Any]) -> Path:
    """Where the plan of ``key`` lies, built or not."""
    return cache_folder() / plan_name(key)


def plan_name(key: Mapping[str, Any]) -> str:
    """The name of its file there."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{_stem(key)}.{digest[:32]}.plan"


def is_kept(key: Mapping[str, Any]) -> bool:
    """Whether a plan of ``key`` lies there, by its record and size: the sha256 is compared when it is taken."""
    path = plan_path(key)
    record = read_record(path)
    return record is not None and path.is_file() and path.stat().st_size == record.size


def obtain(key: Mapping[str, Any], build: Callable[[], Built], say: Say, *, force: bool = False) -> Path:
    """The plan of ``key``, built by ``build`` unless a sound one is there and ``force`` is not set.

    One process builds, others wait for it. A plan appears whole or not at all; its record comes last, and a plan
    without a record, or with another sha256 than the record's, is built again.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = plan_path(key)
    with _lock(path, say):
        trouble = plan_trouble(path, thoroughly=False)
        if trouble is None and not force:
            say(f"{path.name}: taken from the cache")
            return path
        say(f"{_stem(key)}: {_reason(key, path, trouble)}")
        _keep(path, key, build())
    return path


@contextlib.contextmanager
def kept_file(path: Path) -> Iterator[tuple[bytes, Callable[[Any], None]]]:
    """The bytes of a file that builders share, and what replaces it; others wait for the block to end."""
    with _lock(path, lambda _: None):
        data = b""
        with contextlib.suppress(OSError):  # there is none, or it is not the user's alone: it is made anew
            data = read_private(path)
        yield data, lambda data: write_private(path, data)


@contextlib.contextmanager
def scratch() -> Iterator[Callable[[str], Path]]:
    """Names in the cache, by their endings, for files that are gone after the block.

    What a killed process leaves of them, :func:`clean_plans` removes; not before.
    """
    place = cache_folder() / f"scratch-{secrets.token_hex(8)}.plan"
    with _lock(place, lambda _: None):
        try:
            yield lambda ending: place.with_name(f"{place.name}.{ending}")
        finally:
            for path in place.parent.glob(f"{place.name}.*"):
                if path.suffix != ".lock":
                    path.unlink(missing_ok=True)


def clean_plans() -> int:
    """Remove all plans that nobody is building now, and what belongs to them; returns the bytes freed."""
    freed = 0
    for path in sorted(cache_folder().iterdir()):
        name = path.name.removesuffix(".lock")
        name = name.partition(".plan")[0] + ".plan" if ".plan" in name else name
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _lock(path.with_name(name), None):
            if not path.is_dir() or path.is_symlink():
                freed += path.lstat().st_size
                path.unlink()
    return freed


def _keep(path: Path, key: Mapping[str, Any], built: Built) -> None:
    """Write the plan ``path``, and its record last."""
    try:
        sidecar(path).unlink(missing_ok=True)
        weights = None
        if built.weights is not None:
            weights = WeightsRecord.of(built.weights.replace(weights_of(path)))
        if isinstance(built.plan, Path):
            built.plan.replace(path)
        else:
            write_private(path, built.plan)
        record = PlanRecord(
            key=key,
            tensors=built.tensors,
            figures=built.figures,
            weights=weights,
            **dataclasses.asdict(FileRecord.of(path)),
        )
        write_private(sidecar(path), json.dumps(dataclasses.asdict(record), indent=2).encode())
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> BuildError:
    return BuildError(f"{path} cannot be written: {why(error)}; free some space or set CALOTYPE_CACHE")


def _stem(key: Mapping[str, Any]) -> str:
    parts = (str(key["bundle"]), str(key["network"]), str(key["backend"]))
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", part)[:60] for part in parts)


def _reason(key: Mapping[str, Any], path: Path, trouble: str | None) -> str:
    if trouble is None:
        return "built again, as asked"
    return f"built again, since {trouble}" if path.exists() else _changes(key)


def _changes(key: Mapping[str, Any]) -> str:
    """What tells ``key`` from the latest plan of the same network in the same precision."""
    others = sorted(cache_folder().glob(f"{_stem(key)}.*.plan"), key=lambda path: path.stat().st_mtime)
    for record in filter(None, map(read_record, reversed(others))):
        old = record.key
        names = sorted(name for name in key.keys() | old.keys() if key.get(name) != old.get(name))
        if "precision" not in names:
            return f"built again, since these changed: {', '.join(names)}"
    return "not built before"


@contextlib.contextmanager
def _lock(path: Path, say: Say | None) -> Iterator[None]:
    """Hold the lock of one plan; ``say`` None does not wait but raises BlockingIOError.

    Its file is removed at the end by who holds it, so whoever waited for that file has to look whether it is still the
    one of this name. A killed process leaves it, and the next that builds or cleans removes it.
    """
    place = path.with_name(path.name + ".lock")
    while True:
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritten(place, error) from error
        try:
            locked = _wait(descriptor, path, say)
            if not _is_named(descriptor, place):
                continue
            if not locked and say is not None:
                say(f"{place.parent} is on a file system without locks; build from one process at a time")
            try:
                yield
            finally:
                if locked:
                    place.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _wait(descriptor: int, path: Path, say: Say | None) -> bool:
    """Lock, and say so where that takes waiting; False where there are no locks."""
    try:
        return lock(descriptor, wait=False)
    except BlockingIOError:
        if say is None:
            raise
        say(f"{path.name}: waiting for another process that builds it")
        return lock(descriptor, wait=True)


def _is_named(descriptor: int, place: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), place.lstat())
    return False
