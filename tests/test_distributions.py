"""What is released: made twice to the same bytes, installed into a bare environment, and used from another folder."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from calotype.runtime.pipeline import Pipeline
from calotype.runtime.version import __version__

pytestmark = [pytest.mark.slow, pytest.mark.packaging]
ROOT = Path(__file__).parent.parent
WHEEL, SDIST = f"calotype-{__version__}-py3-none-any.whl", f"calotype-{__version__}.tar.gz"
LICENSES = {"LICENSE", "NOTICE", "licenses/CC-BY-4.0.txt", "licenses/MIT.txt"}


def make(target: Path, umask: int = 0o022, **environment: str) -> None:
    command = [sys.executable, str(ROOT / ".ci" / "dist.py"), str(target)]
    subprocess.run(command, check=True, env=os.environ | environment, umask=umask, cwd=target.parent)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def bare(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, its extra for the CPU, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", f"{dist / WHEEL}[cpu]"], check=True)
    return folder / "bin"


def test_the_same_bytes_again_at_another_time_and_place(dist: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", umask=0o077, TZ="Asia/Tokyo", LC_ALL="C")
    for name in (WHEEL, SDIST):
        assert (tmp_path / "again" / name).read_bytes() == (dist / name).read_bytes(), name
    assert sorted(path.name for path in dist.iterdir()) == sorted([WHEEL, SDIST])


def test_the_wheel_says_what_it_is_and_has_its_licences(dist: Path) -> None:
    with zipfile.ZipFile(dist / WHEEL) as file:
        names = set(file.namelist())
        about = email.message_from_bytes(file.read(f"calotype-{__version__}.dist-info/METADATA"))
    assert about["License-Expression"] == "Apache-2.0 AND MIT AND CC-BY-4.0"
    assert set(about.get_all("License-File") or ()) == LICENSES
    assert {f"calotype-{__version__}.dist-info/licenses/{name}" for name in LICENSES} <= names
    assert {name.split("/")[0] for name in names} == {"calotype", f"calotype-{__version__}.dist-info"}
    assert "calotype/runtime/models/talbot/calotype.json" in names


def test_the_source_distribution_makes_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(dist / SDIST) as file:
        file.extractall(tmp_path, filter="data")
    code = f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / SDIST.removesuffix(".tar.gz"), check=True)
    with zipfile.ZipFile(dist / WHEEL) as first, zipfile.ZipFile(tmp_path / WHEEL) as second:
        assert {name: first.read(name) for name in first.namelist()} == {
            name: second.read(name) for name in second.namelist()
        }


def test_the_wheel_draws_from_another_folder(bare: Path, tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    calotype = bare / "calotype"
    assert run(calotype, "--version") == f"calotype, version {__version__}\n"
    run(calotype, "generate", "red apple, noto style", "--seed", "0", "--steps", "3", "--output", "apple.png")
    with Pipeline.load("talbot", "cpu") as pipeline:
        wanted = pipeline("red apple, noto style", seed=0, num_inference_steps=3).images[0]
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.tobytes() == wanted.tobytes()
    assert "\ncpu:           ready (" in run(calotype, "doctor")
    packages = run(bare / "python", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check")
    assert not {"torch", "onnx"} & {line.partition("=")[0] for line in packages.splitlines()}
    run(bare / "python", "-m", "pip", "check", "--disable-pip-version-check")
