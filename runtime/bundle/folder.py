"""A bundle on disk: found by name or folder, checked before anything in it is used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from calotype.runtime.bundle.manifest import FileRecord, Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.files import external_locations

BUNDLED = Path(__file__).parent.parent / "models"


class Bundle:
    """A folder whose files are what its manifest says."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._locks = {name: threading.Lock() for name in manifest.files}
        self._sound: set[str] = set()

    @classmethod
    def open(cls, name_or_folder: str | Path, *, weights: bool = True) -> Bundle:
        """Open the bundled model of that name, or the bundle in that folder, and check every file in it.

        Without ``weights``, of those files only place and size are compared here: before one is read, the caller has to
        call :meth:`check_weights`. What an engine stands for need not be read at all.

        Raises:
            BundleError: when there is none, or a file is missing, of another size or sha256, or a link out of the
                bundle, or a graph reads data that is not one of its weights files.
        """
        path = Path(name_or_folder)
        if not path.exists() and (BUNDLED / path).is_dir() and len(path.parts) == 1:
            path = BUNDLED / path
        if not path.exists():
            bundled = ", ".join(sorted(entry.name for entry in BUNDLED.glob("*") if entry.is_dir())) or "none"
            raise BundleError(
                f"there is no bundle {str(name_or_folder)!r}; bundled models: {bundled}; or give a bundle's folder, "
                "which calotype export makes of a checkpoint"
            )
        bundle = cls(path, Manifest.read(path))
        bundle.check(weights=weights)
        return bundle

    def check(self, *, weights: bool = True) -> None:
        """Compare every file with the manifest; all are read once, on as many cores as there are."""
        later = {path for network in self.manifest.networks.values() for path in network.weights if not weights}
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._check_size, self.manifest.files))
            list(pool.map(self._check_content, self.manifest.files.keys() - later))
        for network in self.manifest.networks.values():
            for graph in network.graphs.values():
                strangers = external_locations(self.path / graph) - set(network.weights)
                if strangers:
                    raise BundleError(
                        f"{graph} reads {', '.join(sorted(strangers))}, which is not one of its weights files "
                        f"({', '.join(network.weights)}); do not use this bundle"
                    )

    def check_weights(self, network: ModelSpec) -> None:
        """Compare the contents of its weights files with the manifest, once; raises BundleError."""
        for name in network.weights:
            self._check_content(name)

    def _check_size(self, name: str) -> None:
        path, record = self.path / name, self.manifest.files[name]
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle; copy or export the bundle again")
        if not any(path.resolve().is_relative_to(home) for home in self._homes()):
            raise BundleError(f"{path} is a link out of the bundle, to {path.resolve()}; do not use this bundle")
        size = path.stat().st_size
        if size != record.size:
            raise BundleError(f"{path} has {size} bytes, {record.size} expected; copy or export the bundle again")

    def _check_content(self, name: str) -> None:
        path = self.path / name
        with self._locks[name]:
            if name not in self._sound and FileRecord.of(path).sha256 != self.manifest.files[name].sha256:
                raise BundleError(
                    f"{path} is corrupt: its sha256 is not the manifest's; copy or export the bundle again"
                )
            self._sound.add(name)

    def _homes(self) -> list[Path]:
        """Where its files may really lie: in its folder, or where a cache of the Hugging Face Hub links to."""
        folder = self.path.resolve()
        return [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
