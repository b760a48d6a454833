"""Plans in one file, to be carried to other machines: ``calotype plans pack``, ``verify`` and ``unpack``.

An archive is a zip file that compresses nothing. ``plans.json`` in it says which files there are, with the size and the
sha256 of each; the others are plans with their records, and weights where an engine has them in a file of their own.

A plan is native code, so nothing is put into the cache that its user has not vouched for, by the archive's sha256 or by
a key whose signature of it is there. The archive is first copied to a private file, and what is then read is the copy
that was vouched for, whoever can write to the original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

from calotype.engine.cache import Built, obtain, plan_name, scratch
from calotype.engine.trust import Trust
from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.bundle.schema import Name, at_least_one, matching, read_as, within
from calotype.runtime.errors import BuildError, InputError
from calotype.runtime.sessions.plans import cache_folder, describe_plan, sidecar, weights_of
from calotype.runtime.sessions.private import create_private
from calotype.runtime.sessions.records import MOST_BYTES, PlanRecord
from calotype.runtime.untrusted import open_regular, parse_json, why
from calotype.runtime.version import __version__

MANIFEST = "plans.json"
FORMAT = 1
MOST_FILES = 3 * 1000  # of a thousand plans
CHUNK = 1 << 20
MOST_DIRECTORY = 1 << 20  # bytes of the zip file's table of contents
# Where a zip file's last records begin, from its end: of any, and what is before that in one above 4 GiB.
END, LOCATOR, END_64 = 22, 42, 98
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date of a zip file: the same plans make the same bytes

FileName = Annotated[
    str, matching(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,250}\.plan(\.json|\.weights)?", "a plan's file name")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``plans.json`` says: the files of the archive by name, and which Calotype packed them."""

    format: Annotated[int, within(FORMAT, FORMAT)]
    calotype: Name
    files: Annotated[Mapping[FileName, FileRecord], at_least_one]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """An open archive whose structure was checked; its plans' bytes are compared when they are read.

    Attributes:
        manifest: see :class:`Manifest`.
        records: of its plans, by their file names.
        file: the zip file.
    """

    manifest: Manifest
    records: Mapping[str, PlanRecord]
    file: zipfile.ZipFile

    def copy(self, name: str, target: Path | None) -> None:
        """Write the file ``name`` to a new private file, or with None look at it only.

        Raises:
            InputError: its bytes are not what the manifest says.
        """
        record, digest, size = self.manifest.files[name], hashlib.sha256(), 0
        try:
            with self.file.open(name) as source, contextlib.ExitStack() as stack:
                file = None if target is None else stack.enter_context(create_private(target))
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    if file is not None:
                        file.write(chunk)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise InputError(f"{name} in the archive cannot be read: {why(error)}; copy the archive anew") from error
        if (size, digest.hexdigest()) != (record.size, record.sha256):
            raise InputError(f"{name} in the archive is not what its manifest says; copy the archive anew")

    def check(self) -> None:
        """Compare every file with the manifest; raises InputError."""
        for name in self.manifest.files:
            self.copy(name, None)


def pack(plans: Sequence[Path], output: Path) -> FileRecord:
    """Write sound plans of the cache into the archive ``output``, and return its size and sha256.

    The same plans give the same bytes, and the file appears whole or not at all.

    Raises:
        BuildError: a plan is not what its record says.
        InputError: there is none, or ``output`` exists.
        OSError: it cannot be written.
    """
    if not plans:
        raise InputError("there is no plan to pack; build some with: calotype build BUNDLE --backend BACKEND")
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} exists; use another name, or remove it first")
    files: dict[str, Path] = {}
    for path in sorted(plans):
        record = describe_plan(path)
        if path.name != plan_name(record.key):
            raise BuildError(f"{path}: its name is not the one that its record gives; build it again")
        files |= {path.name: path, sidecar(path).name: sidecar(path)}
        if record.weights is not None:
            files[weights_of(path).name] = weights_of(path)
    manifest = Manifest(
        format=FORMAT, calotype=__version__, files={name: FileRecord.of(path) for name, path in files.items()}
    )
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.writestr(zipfile.ZipInfo(MANIFEST, EPOCH), json.dumps(dataclasses.asdict(manifest), indent=2))
            for name, path in files.items():
                with open_regular(path) as source, archive.open(_info(name, path), "w") as target:
                    shutil.copyfileobj(source, target, CHUNK)
        with open_archive(partial) as packed:
            packed.check()  # a plan may have been built again meanwhile
        record_of_all = FileRecord.of(partial)
        os.link(partial, output)  # which fails where the name was taken meanwhile
    finally:
        partial.unlink(missing_ok=True)
    return record_of_all


def _info(name: str, path: Path) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.file_size = path.stat().st_size  # so that zip64 is chosen where it is needed
    return info


@contextlib.contextmanager
def open_archive(path: Path, named: Path | None = None) -> Iterator[Archive]:
    """Open an archive and check its structure; messages call it ``named``.

    Raises:
        InputError: it is none, is cut off, or has in it what an archive of plans has not: links, folders, paths, a
            name twice, compression, files that lie over each other, or records that belong to other plans.
    """
    named = named or path
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            size = os.fstat(file.fileno()).st_size
            _check_directory(file, size)
            found = _checked(stack.enter_context(zipfile.ZipFile(file)), size)
        except FileNotFoundError:
            raise InputError(f"{named} does not exist") from None
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise InputError(f"{named} is no sound archive of plans: {why(error)}; fetch it anew") from error
        yield found


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raises ValueError where the table of contents is missing, or larger than one of plans: it is read at once."""
    file.seek(max(0, size - END_64))
    tail = file.read(END_64).rjust(END_64, b"\0")
    file.seek(0)
    if tail[-END : -END + 4] != b"PK\5\6":
        raise ValueError("it does not end as a zip file does; it may be cut off")
    length = int.from_bytes(tail[-END + 12 : -END + 16], "little")
    if tail[-LOCATOR : -LOCATOR + 4] == b"PK\6\7":
        length = max(length, int.from_bytes(tail[40:48], "little"))
    if length > MOST_DIRECTORY:
        raise ValueError(f"its table of contents has {length} bytes; valid: up to {MOST_DIRECTORY}")


def _checked(archive: zipfile.ZipFile, size: int) -> Archive:
    entries = archive.infolist()
    if len(entries) > MOST_FILES + 1:
        raise ValueError(f"it has {len(entries)} files; valid: up to {MOST_FILES}")
    sizes = {entry.filename: entry.file_size for entry in entries}
    if len(sizes) != len(entries):
        raise ValueError("it has a name twice")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ValueError("something in it is compressed or encrypted, which no archive of plans is")
    if any(entry.external_attr >> 16 & 0o170000 not in (0, 0o100000) for entry in entries):
        raise ValueError("something in it is a link or a device, not a file")
    if sum(sizes.values()) > size:
        raise ValueError("its files are larger than itself")
    if not sizes.get(MANIFEST, MOST_BYTES + 1) <= MOST_BYTES:
        raise ValueError(f"it has no {MANIFEST} that can be read")
    manifest = read_as(Manifest, parse_json(archive.read(MANIFEST)), MANIFEST)
    if {name: record.size for name, record in manifest.files.items()} | {MANIFEST: sizes[MANIFEST]} != sizes:
        raise ValueError("its files are not those that its manifest lists")
    return Archive(manifest=manifest, records=_records(archive, manifest), file=archive)


def _records(archive: zipfile.ZipFile, manifest: Manifest) -> dict[str, PlanRecord]:
    """The records of the plans; every file belongs to one of them, and every name is the one its key gives."""
    records, belonging = {}, set[str]()
    for name in (name for name in manifest.files if name.endswith(".plan")):
        files = [name, f"{name}.json"]
        beside = manifest.files.get(files[1])
        if beside is None or beside.size > MOST_BYTES:
            raise ValueError(f"{name} has no record")
        data = archive.read(files[1])
        if hashlib.sha256(data).hexdigest() != beside.sha256:
            raise ValueError(f"{files[1]} is not what its manifest says")
        record = read_as(PlanRecord, parse_json(data), files[1])
        described = {name: FileRecord(size=record.size, sha256=record.sha256)}
        if record.weights is not None:
            files.append(f"{name}.weights")
            described[files[2]] = FileRecord(size=record.weights.size, sha256=record.weights.sha256)
        if plan_name(record.key) != name or any(manifest.files.get(item) != of for item, of in described.items()):
            raise ValueError(f"the record of {name} is of another plan")
        records[name] = record
        belonging |= set(files)
    if belonging != manifest.files.keys():
        raise ValueError(f"{sorted(manifest.files.keys() - belonging)[0]} belongs to no plan in it")
    return records


def unpack(path: Path, trust: Trust, *, force: bool = False) -> tuple[list[Path], list[Path]]:
    """Put the plans of an archive that ``trust`` vouches for into the cache; all of them are checked before any is.

    Args:
        path: the archive.
        trust: what the user vouches by.
        force: replace sound plans that are there, too.

    Returns:
        The plans that were put there, and those that lay there already.

    Raises:
        InputError: nobody vouches for it, or it is not sound; the cache is as it was.
        BuildError: the cache cannot be written, or its disk is too full.
    """
    with scratch() as name:
        _copy(path, name("archive"))
        trust.check(name("archive"), path)
        with open_archive(name("archive"), path) as archive:
            archive.check()
            installed: list[Path] = []
            places = []
            for plan, record in archive.records.items():

                def extract(plan: str = plan, record: PlanRecord = record) -> Built:
                    installed.append(cache_folder() / plan)
                    archive.copy(plan, name("part"))
                    weights = None
                    if record.weights is not None:
                        weights = name("weights")
                        archive.copy(f"{plan}.weights", weights)
                    return Built(plan=name("part"), tensors=record.tensors, figures=record.figures, weights=weights)

                places.append(obtain(record.key, extract, lambda _: None, force=force))
    return installed, [place for place in places if place not in installed]


def _copy(path: Path, target: Path) -> None:
    """Copy a file to ``target``, its user's alone."""
    try:
        source = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {why(error)}") from error
    with source, create_private(target) as copy:
        size, free = os.fstat(source.fileno()).st_size, shutil.disk_usage(target.parent).free
        if 2 * size > free:
            raise BuildError(
                f"{target.parent} has {free >> 20} MiB free and unpacking needs about {2 * size >> 20} MiB; "
                "free some space, or set CALOTYPE_CACHE"
            )
        shutil.copyfileobj(source, copy, CHUNK)
