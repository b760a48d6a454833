"""Checkpoints and bundles that take long to make: made once for all processes and runs, until their makers change."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("calotype", "training", "tests")
PACKAGES = (
    *("diffusers", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript"),
    *("safetensors", "tokenizers", "torch", "transformers"),
)
FORGOTTEN = 2 * 60 * 60  # seconds after which what former sources made is removed


class Kept:
    """A folder of what ``sources``, everything of this project that they import, and the installed packages make.

    What is taken is a copy of one's own, so that a test that writes into it does no harm to another.
    """

    def __init__(self, root: Path, copies: Path, sources: Iterable[Path]) -> None:
        self._folder, self._copies = root / digest(sources), copies
        self._folder.mkdir(parents=True, exist_ok=True)
        os.utime(self._folder)
        for other in root.iterdir():
            if time.time() - other.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(other, ignore_errors=True)

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder ``name``, which ``make`` fills where none did before; another process that asks waits for it."""
        kept, copy = self._folder / name, self._copies / name
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                partial = self._folder / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(kept)
        shutil.copytree(kept, copy)
        return copy


def digest(sources: Iterable[Path]) -> str:
    """Of the files, of all they import from this project, of what comes along with the export, and of the packages."""
    files, waiting = set[Path](), list(sources)
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            waiting += imported(path)
    files |= {path for path in (ROOT / "export" / "data").rglob("*") if path.is_file()}
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for package in PACKAGES:
        found.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return found.hexdigest()[:16]


def imported(path: Path) -> Iterator[Path]:
    """The files of this project that ``path`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] in ROOMS:
                yield from source_of(parts)


def source_of(parts: list[str]) -> Iterator[Path]:
    """The file of that module, where it is a module: rooms of ``calotype`` lie beside it."""
    place = ROOT.joinpath(*(parts[1:] if parts[0] == "calotype" and len(parts) > 1 else parts))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            yield path
