"""A bundle on disk: found by name or folder, checked before anything in it is used."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from calotype.runtime.arguments import as_path
from calotype.runtime.bundle.manifest import FileRecord, Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.graphs.files import GraphFile, read_graph
from calotype.runtime.parallel import run_parallel
from calotype.runtime.untrusted import read_bytes, why

BUNDLED = Path(__file__).parent.parent / "models"


class Bundle:
    """A folder whose files are what its manifest says."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._locks = {name: threading.Lock() for name in manifest.files}
        self._sound: set[str] = set()

    @classmethod
    def open(cls, name_or_folder: str | Path, *, weights: bool = True, sha256: str | None = None) -> Bundle:
        """Open the bundled model of that name, or the bundle in that folder, and check every file in it.

        Without ``weights``, of those files only place and size are compared here: before one is read, the caller has to
        call :meth:`check_weights`. What an engine stands for need not be read at all.

        Args:
            name_or_folder: the bundle.
            weights: see above.
            sha256: a pin: what the manifest's hash has to be, and through it every file.

        Raises:
            BundleError: when there is none, or a file is missing, of another size or sha256, or a link out of the
                bundle, or a graph reads data that is not one of its weights files or takes other inputs than the
                manifest says; or it is not the one that is pinned.
            InputError: ``name_or_folder`` is no path, or ``sha256`` no such hash.
        """
        path = as_path("bundle", name_or_folder)
        if not _exists(path) and len(path.parts) == 1 and _exists(BUNDLED / path):
            path = BUNDLED / path
        if not _exists(path):
            bundled = ", ".join(sorted(entry.name for entry in BUNDLED.glob("*") if entry.is_dir())) or "none"
            raise BundleError(
                f"there is no bundle {quoted(str(name_or_folder))}; bundled models: {bundled}; or give a bundle's "
                "folder, which calotype export makes of a checkpoint"
            )
        bundle = cls(path, Manifest.read(path))
        if sha256 is not None:
            bundle.check_pin(sha256)
        bundle.check(weights=weights)
        return bundle

    def check_pin(self, sha256: str) -> None:
        """Raises BundleError where the manifest's hash is not ``sha256``, and InputError where that is none."""
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise InputError(f"sha256={quoted(sha256)} is no SHA-256; give the 64 digits that calotype info shows")
        if self.manifest.sha256 != sha256.lower():
            raise BundleError(
                f"{self.path} is not the pinned bundle: its manifest's sha256 is {self.manifest.sha256}, "
                f"{sha256.lower()} expected; do not use it, or pin the new one if the change is yours"
            )

    def check(self, *, weights: bool = True) -> None:
        """Compare every file with the manifest; all are read once, on as many cores as there are."""
        later = {path for network in self.manifest.networks.values() for path in network.weights if not weights}
        for name in self.manifest.files:
            self._check_size(name)
        run_parallel(self._check_content, self.manifest.files.keys() - later)
        for name, network in self.manifest.networks.items():
            for path in network.graphs.values():
                graph = read_graph(self.path / path)
                strangers = graph.locations - set(network.weights)
                if strangers:
                    raise BundleError(
                        f"{path} reads {', '.join(sorted(strangers)[:8])[:400]}, which is not one of its weights files "
                        f"({', '.join(network.weights[:8])}); do not use this bundle"
                    )
                self._check_tensors(name, network, path, graph)

    def read(self, name: str, most: int) -> bytes:
        """The contents of one of its small files, of at most ``most`` bytes; raises BundleError."""
        try:
            return read_bytes(self.path / name, most)
        except OSError as error:
            message = f"{self.path / name} cannot be read: {why(error)}"
            raise BundleError(f"{message}; copy or export the bundle again") from error

    def check_weights(self, network: ModelSpec) -> None:
        """Compare the contents of its weights files with the manifest, once; raises BundleError."""
        for name in network.weights:
            self._check_content(name)

    def _check_tensors(self, name: str, network: ModelSpec, path: str, graph: GraphFile) -> None:
        """The graph takes and gives what the manifest says."""
        for way, specs, found in (
            ("inputs", network.inputs, graph.inputs),
            ("outputs", network.outputs, graph.outputs),
        ):
            wrong = [spec.name for spec in specs if not _is_like(spec.dtype, spec.shape, found.get(spec.name))]
            more = found.keys() - {spec.name for spec in specs}
            if wrong or (more and way == "inputs"):
                raise BundleError(
                    f"the manifest is wrong about the {way} of {name}: {path} has others at "
                    f"{', '.join(quoted(item) for item in sorted({*wrong, *more})[:4])}; export the bundle again"
                )

    def _check_size(self, name: str) -> None:
        path, record = self.path / name, self.manifest.files[name]
        try:
            if not path.is_file():
                raise BundleError(f"{path} is missing from the bundle; copy or export the bundle again")
            if not any(path.resolve().is_relative_to(home) for home in self._homes()):
                raise BundleError(f"{path} is a link out of the bundle, to {path.resolve()}; do not use this bundle")
            size = path.stat().st_size
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {why(error)}; copy or export the bundle again") from error
        if size != record.size:
            raise BundleError(f"{path} has {size} bytes, {record.size} expected; copy or export the bundle again")

    def _check_content(self, name: str) -> None:
        path = self.path / name
        with self._locks[name]:
            try:
                sound = name in self._sound or FileRecord.of(path).sha256 == self.manifest.files[name].sha256
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {why(error)}; copy or export the bundle again") from error
            if not sound:
                raise BundleError(
                    f"{path} is corrupt: its sha256 is not the manifest's; copy or export the bundle again"
                )
            self._sound.add(name)

    def _homes(self) -> list[Path]:
        """Where its files may really lie: in its folder, or where a cache of the Hugging Face Hub links to."""
        folder = self.path.resolve()
        return [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]


def _exists(path: Path) -> bool:
    """Whether it is there; what can be no path, with a NUL in it or too long, is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_like(dtype: str, shape: tuple[int | str, ...], found: tuple[str, tuple[int | None, ...]] | None) -> bool:
    """Whether the tensor ``found`` in a graph is as the manifest says; a dimension that it leaves open fits all."""
    if found is None or found[0] != dtype or len(found[1]) != len(shape):
        return False
    return all(own is None or own == said for own, said in zip(found[1], shape, strict=True))


def check_kind(bundle: Bundle, *kinds: str) -> None:
    """Raises BundleError where the bundle is of none of ``kinds``."""
    own = bundle.manifest.kind
    if own not in kinds:
        hint = "; give it as vae, beside a model" if own == "vae" else ""
        raise BundleError(f"{bundle.path} is a bundle of the kind {own!r}, and {' or '.join(kinds)} is needed{hint}")
