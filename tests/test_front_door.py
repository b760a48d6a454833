"""``import calotype``: cheap, lazy, and the same names as in the rooms."""

from __future__ import annotations

import subprocess
import sys

import calotype
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.version import __version__


def test_the_front_door_has_the_names_of_the_rooms() -> None:
    assert calotype.Pipeline is calotype.runtime.Pipeline is Pipeline
    assert calotype.Request is calotype.runtime.Request is Request
    assert calotype.errors.InputError is InputError
    assert calotype.__version__ == __version__
    assert set(calotype.__all__) <= set(dir(calotype))


def test_importing_it_imports_nothing_heavy() -> None:
    script = "import sys, calotype; print(*sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"numpy", "PIL", "onnxruntime", "tokenizers", "click", "torch", "calotype.runtime.pipeline"}
    assert not heavy & set(printed.stdout.split())
    assert printed.stderr == ""


def test_it_is_a_program() -> None:
    command = [sys.executable, "-m", "calotype", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == f"calotype, version {__version__}"
