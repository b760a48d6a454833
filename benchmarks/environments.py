"""An environment for each peer, made from its pinned requirements the first time it is needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = Path(".work").resolve()
REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
# What a source distribution is compiled with, where its own defaults leave the processor's instructions unused.
BUILD = {"stable-diffusion-cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}}
SOURCES = ("runtime", "export", "engine", "pyproject.toml", "README.md", "LICENSE")


def python(name: str, work: Path) -> Path:
    """The interpreter of the environment ``name`` below ``work``, made anew when its requirements have changed."""
    folder, requirements = work / name, REQUIREMENTS / f"{name}.txt"
    stamp = folder / "requirements.sha256"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    interpreter = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # The lists are complete, and leave out what would not be used: packages for CUDA, torchvision.
        _pip(interpreter, ["--no-deps", "-r", str(requirements)], BUILD.get(name, {}))
        stamp.write_text(wanted)
    if name == "calotype":
        _install_calotype(interpreter)
    return interpreter


def size(name: str, work: Path) -> int:
    """Bytes of what is installed in the environment ``name``, pip left out."""
    (packages,) = (work / name / "lib").glob("python*/site-packages")
    files = (path for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if path.relative_to(packages).parts[0].partition("-")[0] != "pip")


def _install_calotype(interpreter: Path) -> None:
    """Install the tree as it stands, from a copy: a build leaves files beside the sources."""
    with tempfile.TemporaryDirectory() as folder:
        for name in SOURCES:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        _pip(interpreter, ["--no-deps", "--force-reinstall", folder])


def _pip(interpreter: Path, arguments: list[str], variables: dict[str, str] | None = None) -> None:
    command = [interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **(variables or {})})
