"""What errors and ``calotype doctor`` say of a package that is missing: a line that works where Calotype was cloned."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from calotype.runtime import errors
from calotype.runtime.errors import MissingPackageError, install_line

CLONE = Path(__file__).resolve().parents[2]


def test_the_line_runs_from_any_folder() -> None:
    words = shlex.split(install_line("cpu"))
    assert words == [sys.executable, "-m", "pip", "install", "-e", f"{CLONE}[cpu]"]
    assert "cpu" in tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_wheel_says_where_the_line_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "calotype" / "runtime" / "errors.py"))
    assert install_line("tensorrt") == "pip install '.[tensorrt]' in a clone of Calotype"


def test_the_package_that_is_in_the_way_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: ["onnxruntime"])
    first, _, then = install_line("cuda").partition(", then ")
    assert shlex.split(first) == [sys.executable, "-m", "pip", "uninstall", "onnxruntime"]
    assert shlex.split(then)[-3:] == ["--force-reinstall", "-e", f"{CLONE}[cuda]"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    assert shlex.split(install_line("cuda"))[-1] == f"{CLONE}[cuda]"


def test_without_pytorch_the_small_one_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = str(MissingPackageError("torch", "export"))
    assert message.startswith("torch is not installed; install it with: ")
    small, _, rest = message.partition(", then ")
    assert "-m pip install torch --index-url https://download.pytorch.org/whl/cpu" in small
    assert shlex.split(rest)[-1] == f"{CLONE}[export]"


def test_with_pytorch_it_is_left_alone() -> None:
    assert "--index-url" not in install_line("export")
