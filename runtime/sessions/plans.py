"""Plans on disk: where they lie, what the record beside each says, and which of them serve a network here.

A plan is native code: it lies in the user's own folder, and its bytes are compared with the recorded sha256 before
anything deserializes them. The plan of the CPU backend is an ONNX graph, and its weights are a file of their own, which
is mapped into memory and so shared by all who run it. They are data, and gigabytes: where size and time of change are
the recorded ones they are taken for what was written, else their sha256 decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from calotype.runtime.bundle.manifest import FileRecord, Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BuildError

# The target of a plan that runs on every GPU its library knows; TensorRT-RTX compiles the rest where it runs.
PORTABLE = {"gpu": "portable", "driver": "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """The weights beside a plan of the CPU backend: bytes, sha256, and when they were written, in nanoseconds."""

    size: int
    sha256: str
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure ``path``."""
        return cls(**dataclasses.asdict(FileRecord.of(path)), mtime_ns=path.stat().st_mtime_ns)

    def describes(self, path: Path, *, thoroughly: bool) -> bool:
        """Whether ``path`` is that file; ``thoroughly`` reads it even where nobody seems to have touched it."""
        try:
            status = path.stat()
        except OSError:
            return False
        if status.st_size != self.size:
            return False
        untouched = status.st_mtime_ns == self.mtime_ns
        return (untouched and not thoroughly) or FileRecord.of(path).sha256 == self.sha256


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

    key: Mapping[str, Any]
    tensors: Mapping[str, Any]
    figures: Mapping[str, float]
    size: int
    sha256: str
    weights: WeightsRecord | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` made; raises TypeError for anything else."""
        weights = value.get("weights")
        return cls(**{**value, "weights": None if weights is None else WeightsRecord(**weights)})


def cache_folder() -> Path:
    """``$CALOTYPE_CACHE``, else ``calotype`` in the user's cache folder, then ``plans``; made with mode 0700.

    Raises:
        BuildError: it cannot be made, or belongs to somebody else.
    """
    folder = _folder()
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


def list_plans() -> list[Path]:
    """Every plan of the cache, by name; unsound ones too."""
    return sorted(_folder().glob("*.plan"))


def has_plan(manifest: Manifest, spec: ModelSpec, backend: str) -> bool:
    """Whether ``backend`` has built a plan of the network ``spec`` here, for whichever machine and shapes."""
    graphs = {manifest.files[graph].sha256 for graph in spec.graphs.values()}
    records = filter(None, map(read_record, list_plans()))
    return any(record.key.get("backend") == backend and record.key.get("graph") in graphs for record in records)


def sidecar(path: Path) -> Path:
    """Where the record of the plan ``path`` lies."""
    return path.with_name(path.name + ".json")


def weights_of(path: Path) -> Path:
    """Where the weights of the plan ``path`` lie, where it has a file of them."""
    return path.with_name(path.name + ".weights")


def read_record(path: Path) -> PlanRecord | None:
    """The record of the plan ``path``; None when it is missing or no record. The plan itself is not read."""
    try:
        return PlanRecord.from_json(json.loads(sidecar(path).read_text()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def plan_trouble(path: Path, *, thoroughly: bool = True) -> str | None:
    """Why the plan cannot be used; None when it is what its record says. See :class:`WeightsRecord` for the last."""
    if not path.is_file():
        return "there is no such plan"
    record = read_record(path)
    if record is None:
        return "its record is missing or cannot be read"
    if FileRecord.of(path) != FileRecord(size=record.size, sha256=record.sha256):
        return "its sha256 is not the recorded one"
    if record.weights is not None and not record.weights.describes(weights_of(path), thoroughly=thoroughly):
        return f"{weights_of(path).name} is not the file that it was built with"
    return None


def describe_plan(path: Path) -> PlanRecord:
    """What the record beside the plan ``path`` says, after the plan's sha256 was checked; nothing is deserialized.

    Raises:
        BuildError: there is no plan or record, or they do not belong together.
    """
    trouble, record = plan_trouble(path), read_record(path)
    if trouble is not None or record is None:
        raise BuildError(f"{path}: {trouble}; build it again with: calotype build")
    return record


def read_plan(path: Path, record: PlanRecord) -> bytes:
    """The plan's bytes, which are those that were checked: the file is read once.

    Raises:
        BuildError: it is gone, or its sha256 is not the recorded one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; build it again with: calotype build") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BuildError(f"{path}: its sha256 is not the recorded one; build it again with: calotype build")
    return data


def write_private(path: Path, data: Any) -> None:
    """Write a file of the cache, whole or not at all, that its owner alone reads; raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Wanted(Protocol):
    """What a plan has to be for one network on this machine."""

    @property
    def backend(self) -> str:
        """A name in ``BACKENDS``."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """The sha256 of each variant of the network's graph."""

    @property
    def precision(self) -> str | None:
        """What it computes in; None is anything."""

    def differences(self, key: Mapping[str, Any]) -> list[str]:
        """What keeps the plan of ``key`` from serving, each as ``what: its own, here …``; empty when it serves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedOnCpu:
    """See :class:`Wanted`.

    Attributes:
        version: of ONNX Runtime, whose graphs are for itself alone.
        graphs: sha256 of the network's float32 graph.
        weights: sha256 of its weights files.
        processor: what :func:`calotype.runtime.sessions.processor.instruction_sets` says.
        precision: ``float32`` or ``int8``.
    """

    version: str
    graphs: tuple[str, ...]
    weights: tuple[str, ...]
    processor: str
    precision: str = "float32"
    backend: str = "cpu"

    def differences(self, key: Mapping[str, Any]) -> list[str]:
        """See :meth:`Wanted.differences`."""
        found = []
        if tuple(key["weights"]) != self.weights:
            found.append("it has other weights")
        if key["version"] != self.version:
            found.append(f"it was built by ONNX Runtime {key['version']}, here is {self.version}")
        if key["processor"] != self.processor:
            found.append(f"it is for a processor with {key['processor']}, here is {self.processor}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedOnGpu:
    """See :class:`Wanted`.

    Attributes:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the installed library.
        graphs: sha256 of each variant of the network's graph.
        weights: sha256 of its weights files.
        gpu: name and compute capability, as in ``NVIDIA H100 sm90``.
        driver: the CUDA version it supports.
        precision: see :class:`Wanted`.
    """

    backend: str
    version: str
    graphs: tuple[str, ...]
    weights: tuple[str, ...]
    gpu: str
    driver: str
    precision: str | None = None

    def differences(self, key: Mapping[str, Any]) -> list[str]:
        """See :meth:`Wanted.differences`."""
        found = []
        if not key["stripped"] and tuple(key["weights"]) != self.weights:
            found.append("it has other weights")
        if key["version"] != self.version and not key["version_compatible"]:
            found.append(f"it was built by {self.backend} {key['version']}, here is {self.version}")
        if key["gpu"] != PORTABLE["gpu"]:
            here = self.gpu.rpartition(" ")[2] if key["hardware_compatible"] else self.gpu
            if key["gpu"] != here:
                found.append(f"it is for the GPU {key['gpu']}, here is {here}")
            if key["driver"] != self.driver:
                found.append(f"it was built with driver {key['driver']}, here is {self.driver}")
        return found


def find_plans(wanted: Wanted) -> tuple[list[tuple[Path, PlanRecord]], str]:
    """Plans that serve, the newest first, and why the newest of the others does not (empty when there is none)."""
    serving: list[tuple[float, Path, PlanRecord]] = []
    refused: list[tuple[float, str]] = []
    for path in list_plans():
        record = read_record(path)
        with contextlib.suppress(KeyError, TypeError, OSError):
            if record is None or record.key["backend"] != wanted.backend or record.key["graph"] not in wanted.graphs:
                continue
            if wanted.precision not in (None, record.key["precision"]):
                continue
            differences, age = wanted.differences(record.key), path.stat().st_mtime
            if differences:
                refused.append((age, f"{path.name} does not serve: {'; '.join(differences)}"))
            else:
                serving.append((age, path, record))
    serving.sort(key=lambda item: item[0], reverse=True)
    return [(path, record) for _, path, record in serving], max(refused, default=(0.0, ""))[1]


def _folder() -> Path:
    base = os.environ.get("CALOTYPE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base) if base else Path(home).expanduser() / "calotype") / "plans"
