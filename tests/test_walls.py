"""Which room may import what, and that every package is in the wheel."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "runtime": {"torch", "onnx", "onnxscript", "transformers", "diffusers", "safetensors"},
    "engine": {"torch", "transformers", "diffusers"},
    "export": {"tensorrt", "tensorrt_rtx", "cuda", "transformers", "diffusers"},
}
# The commands that may import a room, when they are called.
COMMANDS_OF = {
    "calotype.export": {"runtime/cli/export.py", "runtime/cli/verify.py"},
    "calotype.engine": {"runtime/cli/build.py"},
}
ONLY_IN = {
    # By name in one file alone, which turns its telemetry off; the others that may have it ask that.
    "onnxruntime": set(),
    "calotype.runtime.onnx_runtime": {
        "runtime/sessions/onnxruntime_cpu.py",
        "runtime/sessions/onnxruntime_cuda.py",
        "engine/cpu.py",
        "export/parity.py",
    },
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_no_room_imports_what_it_may_not(room: str) -> None:
    paths = sorted((ROOT / room).rglob("*.py"))
    assert paths
    for path in paths:
        relative = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in FORBIDDEN[room], f"{relative} imports {name}"
            for wall in (top, name):
                assert relative in ONLY_IN.get(wall, {relative}), f"{relative} imports {name}"
            if room == "runtime" and name.startswith(tuple(COMMANDS_OF)):
                assert relative in COMMANDS_OF[".".join(name.split(".")[:2])], f"{relative} imports {name}"


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "calotype." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in FORBIDDEN
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == {"calotype", *found}
    assert all((ROOT / room / "py.typed").exists() for room in ("calotype", *FORBIDDEN))
