"""Plans on disk: where they lie, what the record beside each says, and which of them serve a network here.

A plan is native code: it lies in the user's own folder, every file of it is checked to be the user's alone when it is
opened, and its bytes are compared with the recorded sha256 before anything deserializes them. The plan of the CPU
backend is an ONNX graph, and its weights are a file of their own, which is mapped into memory and so shared by all who
run it. They are data, and gigabytes: at every start, where size and time of change are the recorded ones they are taken
for what was written, else their sha256 decides. ``calotype verify``, ``calotype build --list`` and ``calotype info``
always compare the sha256.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from calotype.runtime.bundle.manifest import FileRecord, Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BuildError
from calotype.runtime.sessions.private import check_folder, open_private, read_private
from calotype.runtime.sessions.records import PlanRecord, WeightsRecord
from calotype.runtime.untrusted import why

AGAIN = "build it again with: calotype build BUNDLE --backend BACKEND"
logger = logging.getLogger(__name__)
ADVICE = "see that it is yours and that nobody else can write to it, or set CALOTYPE_CACHE to another folder"
# The target of a plan that runs on every GPU its library knows; TensorRT-RTX compiles the rest where it runs.
PORTABLE = {"gpu": "portable", "driver": "none"}


def cache_home() -> Path | None:
    """``$CALOTYPE_CACHE``, else ``calotype`` in the user's cache folder, then ``plans``; None where there is neither.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory Specification wants it.

    Raises:
        BuildError: ``CALOTYPE_CACHE`` begins with the home folder of a user that is not known.
    """
    given = os.environ.get("CALOTYPE_CACHE", "")
    if given:
        try:
            return Path(given).expanduser() / "plans"
        except RuntimeError:
            raise BuildError(f"CALOTYPE_CACHE={given} is in a home folder that is not known; give it whole") from None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        with contextlib.suppress(RuntimeError):
            base = Path("~/.cache").expanduser()
    return base / "calotype" / "plans" if base.is_absolute() else None


def cache_folder() -> Path:
    """The folder that plans are kept in, see :func:`cache_home`; made with mode 0700.

    Raises:
        BuildError: it cannot be made, or is not the user's alone.
    """
    folder = cache_home()
    if folder is None:
        raise BuildError("there is no home folder to keep plans in; set CALOTYPE_CACHE to a folder that can be written")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_folder(folder)
    except PermissionError as error:
        raise BuildError(f"{folder} cannot be used: {why(error)}; {ADVICE}") from error
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be made: {why(error)}; set CALOTYPE_CACHE to a folder that can be written"
        ) from error
    return folder


def list_plans() -> list[Path]:
    """Every plan of the cache, by name; unsound ones too. A cache that is not the user's alone has none."""
    try:
        folder = cache_home()
        if folder is None:
            return []
        check_folder(folder)
        return sorted(folder.glob("*.plan"))
    except FileNotFoundError:
        return []
    except OSError as error:
        _say(f"the plans in {folder} are passed over: {why(error)}; {ADVICE}")
        return []


def has_plan(manifest: Manifest, spec: ModelSpec, backend: str) -> bool:
    """Whether ``backend`` has built a plan of the network ``spec`` here, for whichever machine and shapes."""
    graphs = {manifest.files[graph].sha256 for graph in spec.graphs.values()}
    return any(record.key["backend"] == backend and record.key["graph"] in graphs for _, record in sound_records())


def plans_of(manifest: Manifest) -> list[Path]:
    """The plans that were built of the bundle, for whichever machine."""
    graphs = {manifest.files[graph].sha256 for spec in manifest.networks.values() for graph in spec.graphs.values()}
    weights = {manifest.files[path].sha256 for spec in manifest.networks.values() for path in spec.weights}
    return [
        path
        for path, record in sound_records()
        if record.key["graph"] in graphs and weights.issuperset(record.key["weights"])
    ]


def sidecar(path: Path) -> Path:
    """Where the record of the plan ``path`` lies."""
    return path.with_name(path.name + ".json")


def weights_of(path: Path) -> Path:
    """Where the weights of the plan ``path`` lie, where it has a file of them."""
    return path.with_name(path.name + ".weights")


def sound_records() -> Iterator[tuple[Path, PlanRecord]]:
    """The plans of the cache whose records can be read, and those; another is passed over with a line."""
    for path in list_plans():
        record, trouble = _record(path)
        if record is not None:
            yield path, record
        else:
            _say(f"the plan {path.name} is passed over: {trouble}; remove it, or {AGAIN}")


def read_record(path: Path) -> PlanRecord | None:
    """The record of the plan ``path``; None when it is missing or no record. The plan itself is not read."""
    return _record(path)[0]


def plan_trouble(path: Path, *, thoroughly: bool = True) -> str | None:
    """Why the plan cannot be used; None when it is what its record says.

    Its weights in a file of their own are gigabytes: ``thoroughly`` reads them, else they are taken for what was
    written where nobody seems to have touched them.
    """
    record, trouble = _record(path)
    if record is None:
        return trouble if path.exists() else "there is no such plan"
    try:
        with open_private(path) as file:
            if FileRecord.of_file(file) != FileRecord(size=record.size, sha256=record.sha256):
                return "its sha256 is not the recorded one"
        if record.weights is not None and not _describes(record.weights, weights_of(path), thoroughly):
            return f"{weights_of(path).name} is not the file that it was built with"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {why(error)}"
    return None


def describe_plan(path: Path) -> PlanRecord:
    """What the record beside the plan ``path`` says, after the plan's sha256 was checked; nothing is deserialized.

    Raises:
        BuildError: there is no plan or record, or they do not belong together.
    """
    trouble, record = plan_trouble(path), read_record(path)
    if trouble is not None or record is None:
        raise BuildError(f"{path}: {trouble}; {AGAIN}")
    return record


def read_plan(path: Path, record: PlanRecord) -> bytes:
    """The plan's bytes, which are those that were checked: the file is read once.

    Raises:
        BuildError: it is gone, or not the user's alone, or its sha256 is not the recorded one.
    """
    try:
        data = read_private(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {why(error)}; {AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BuildError(f"{path}: its sha256 is not the recorded one; {AGAIN}")
    return data


def _record(path: Path) -> tuple[PlanRecord | None, str]:
    """The record of a plan, or what is wrong with it."""
    try:
        return PlanRecord.read(sidecar(path)), ""
    except FileNotFoundError:
        return None, "its record is missing"
    except (OSError, ValueError) as error:
        return None, f"its record cannot be read: {why(error)}"


def _describes(record: WeightsRecord, path: Path, thoroughly: bool) -> bool:
    with open_private(path) as file:
        status = os.fstat(file.fileno())
        if status.st_size != record.size:
            return False
        untouched = status.st_mtime_ns == record.mtime_ns
        return (untouched and not thoroughly) or FileRecord.of_file(file).sha256 == record.sha256


@functools.lru_cache(maxsize=1000)
def _say(line: str) -> None:
    """Warn, once: the cache is looked through for every network."""
    logger.warning("%s", line)


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
        return found + gpu_differences(key, self.gpu, self.driver)


def gpu_differences(key: Mapping[str, Any], gpu: str, driver: str) -> list[str]:
    """What keeps the plan of ``key`` from running on a GPU, named as in ``NVIDIA H100 sm90``, with that driver."""
    found, capability = [], gpu.rpartition(" ")[2]
    targets = key.get("targets", ())
    if targets:
        if capability not in targets:
            found.append(f"it is for GPUs of {', '.join(targets)}, here is {gpu}")
        if _number(driver) < _number(key["driver"]):  # it was meant to be carried, and later drivers run it
            found.append(f"it needs driver {key['driver']} or a later one, here is {driver}")
    elif key["gpu"] != PORTABLE["gpu"]:
        here = capability if key["hardware_compatible"] else gpu
        if key["gpu"] != here:
            found.append(f"it is for the GPU {key['gpu']}, here is {here}")
        if key["driver"] != driver:
            found.append(f"it was built with driver {key['driver']}, here is {driver}")
    return found


def target_of(key: Mapping[str, Any]) -> str:
    """What the plan of ``key`` is for, in words: a processor, a GPU, or several kinds of them."""
    if key["backend"] == "cpu":
        return str(key["processor"])
    return ", ".join(key.get("targets", ())) or str(key["gpu"])


def _number(driver: str) -> int:
    """Of a CUDA version as drivers state it, 13000 for 13.0; what is none needs none."""
    return int(driver) if driver.isdecimal() else 0


def find_plans(wanted: Wanted) -> tuple[list[tuple[Path, PlanRecord]], str]:
    """Plans that serve, the newest first, and why the newest of the others does not (empty when there is none)."""
    serving: list[tuple[float, Path, PlanRecord]] = []
    refused: list[tuple[float, str]] = []
    for path, record in sound_records():
        if record.key["backend"] != wanted.backend or record.key["graph"] not in wanted.graphs:
            continue
        if wanted.precision not in (None, record.key["precision"]):
            continue
        differences = wanted.differences(record.key)
        with contextlib.suppress(OSError):  # somebody has removed it meanwhile
            age = path.stat().st_mtime
            if differences:
                refused.append((age, f"{path.name} does not serve: {'; '.join(differences)}"))
            else:
                serving.append((age, path, record))
    serving.sort(key=lambda item: item[0], reverse=True)
    return [(path, record) for _, path, record in serving], max(refused, default=(0.0, ""))[1]
