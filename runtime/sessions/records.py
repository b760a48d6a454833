"""What the record beside a plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.bundle.schema import (
    Name,
    NetworkName,
    Plain,
    SchemaError,
    Sha256,
    Size,
    Word,
    at_least_one,
    read,
    read_as,
)
from calotype.runtime.sessions.private import open_private
from calotype.runtime.untrusted import parse_json

MOST_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """The weights beside a plan of the CPU backend: bytes, sha256, and when they were written, in nanoseconds."""

    size: Size
    sha256: Sha256
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure ``path``; raises OSError."""
        return cls(**dataclasses.asdict(FileRecord.of(path)), mtime_ns=path.stat().st_mtime_ns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Key:
    """What is read of every key."""

    bundle: Name
    network: NetworkName
    version: Name
    graph: Name
    weights: tuple[Name, ...]
    precision: Word


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CpuKey(_Key):
    """What is read of the key of an engine."""

    processor: Name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Profile:
    name: Name
    batch: Name
    height: Name
    width: Name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GpuKey(_Key):
    """What is read of the key of a plan for a GPU."""

    profiles: tuple[_Profile, ...]
    version_compatible: bool
    hardware_compatible: bool
    stripped: bool
    gpu: Name
    driver: Name
    targets: tuple[Word, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: Name
    dtype: Word
    shape: tuple[int | Name, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensors:
    inputs: tuple[_Tensor, ...] = ()
    outputs: tuple[_Tensor, ...] = ()
    profiles: tuple[Mapping[Name, Annotated[tuple[tuple[int, ...], ...], at_least_one]], ...] = ()


def _tensors(value: Any) -> str | None:
    try:
        read(_Tensors, value, "tensors")
    except SchemaError as error:
        return f"inputs, outputs and profiles ({error})"
    return None


def _key(value: Mapping[str, Any]) -> str | None:
    """What is wrong with a key. Builders of other versions may know more fields, which nothing here reads."""
    kind = _CpuKey if value.get("backend") == "cpu" else _GpuKey
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        read(kind, {name: item for name, item in value.items() if name in known}, "key")
    except SchemaError as error:
        return f"a plan's key ({error})"
    return None if isinstance(value.get("backend"), str) else "a plan's key, with the name of a backend"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The sidecar of a plan.

    Attributes:
        key: what it was made from and for; see :func:`calotype.engine.build.build_bundle`.
        tensors: its inputs and outputs, and under ``profiles`` the (min, opt, max) shapes of every input.
        figures: ``seconds`` of the build, and bytes of GPU memory for ``weights`` and ``activations`` as the builder
            told them, 0 where it did not.
        size: bytes.
        sha256: of the plan.
        weights: in a file of their own; None where they lie in the plan, or in the bundle.
    """

    key: Annotated[Mapping[Name, Plain], _key]
    tensors: Annotated[Mapping[Name, Plain], _tensors]
    figures: Mapping[Name, float]
    size: Size
    sha256: Sha256
    weights: WeightsRecord | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the record in the file ``path``, which is private.

        Raises:
            OSError: it cannot be opened, or is not private.
            ValueError: it is no record.
        """
        with open_private(path) as file:
            return read_as(cls, parse_json(file.read(MOST_BYTES)), "record")
