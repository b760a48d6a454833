"""The plan cache's writing side: one builder at a time, and a plan appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.errors import BuildError
from calotype.runtime.sessions.plans import (
    PlanRecord,
    WeightsRecord,
    cache_folder,
    plan_trouble,
    read_record,
    sidecar,
    weights_of,
    write_private,
)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A fresh plan, an object with the buffer protocol, and what its record says of it.

    ``weights``: a file in the cache, to be moved beside the plan; None where there is none.
    """

    plan: Any
    tensors: Mapping[str, Any]
    figures: Mapping[str, float]
    weights: Path | None = None


def plan_path(key: Mapping[str, Any]) -> Path:
    """Where the plan of ``key`` lies, built or not."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{_stem(key)}.{digest[:32]}.plan"


def is_kept(key: Mapping[str, Any]) -> bool:
    """Whether a plan of ``key`` lies there, by its record and size: the sha256 is compared when it is taken."""
    path = plan_path(key)
    record = read_record(path)
    return record is not None and path.exists() and path.stat().st_size == record.size


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
        built = build()
        sidecar(path).unlink(missing_ok=True)
        try:
            weights = None
            if built.weights is not None:
                weights = WeightsRecord.of(built.weights.replace(weights_of(path)))
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
            raise BuildError(
                f"{path} cannot be written: {error.strerror}; free some space or set CALOTYPE_CACHE"
            ) from error
    return path


@contextlib.contextmanager
def kept_file(path: Path) -> Iterator[tuple[bytes, Callable[[Any], None]]]:
    """The bytes of a file that builders share, and what replaces it; others wait for the block to end."""
    with _lock(path, lambda _: None):
        yield path.read_bytes() if path.exists() else b"", lambda data: write_private(path, data)


def clean_plans() -> int:
    """Remove all plans that nobody is building now, and what belongs to them; returns the bytes freed."""
    freed = 0
    for path in sorted(cache_folder().iterdir()):
        if path.suffix == ".lock":
            continue
        name = path.name.partition(".plan")[0] + ".plan" if ".plan" in path.name else path.name
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _lock(path.with_name(name), None):
            freed += path.stat().st_size
            path.unlink()
    return freed


def _stem(key: Mapping[str, Any]) -> str:
    parts = (str(key["bundle"]), str(key["network"]), str(key["backend"]))
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)


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
