"""Which room may import what, that no imports go in a circle, and that every package is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("calotype", "engine", "export", "runtime", "serving")
# By files: what of ours, and what of others, they may import. The last line that fits a file counts.
BASE = "runtime.{arguments,arrays,closing,errors,locks,parallel,untrusted,version}"
# ONNX Runtime is imported in one file alone, which turns its telemetry off; the others that may have it ask that.
ORT = "runtime.onnx_runtime"
# The packages of the server: APIs stand on what is common to them, and none of that knows workers.
SHARED = "serving.{errors,service,tasks,wording}"
WORKERS, HTTP = f"{SHARED} serving.workers", f"{SHARED} serving.http"
OPENAI, WEBUI = f"{HTTP} serving.openai", f"{HTTP} serving.webui"
WALLS: list[tuple[str, str, str]] = [
    ("calotype/*", "runtime", ""),
    ("engine/*", f"engine runtime.{{bundle,diagnostics,graphs,sessions}} {BASE}", "numpy onnx"),
    ("engine/trust.py", f"runtime.bundle {BASE}", "minisign"),
    ("engine/calibration.py", f"engine runtime.{{bundle,pipeline,sessions}} {BASE}", "numpy"),
    ("engine/cpu.py", f"engine runtime.{{bundle,diagnostics,graphs,sessions}} {ORT} {BASE}", "numpy onnx"),
    ("export/*", f"export runtime.bundle {BASE}", "numpy onnx onnx_ir onnxscript safetensors torch"),
    ("export/hub.py", f"export runtime.bundle {BASE}", "huggingface_hub"),
    ("export/parity.py", f"export runtime.{{bundle,sessions}} {ORT} {BASE}", "numpy torch"),
    ("runtime/*", "runtime", "numpy PIL"),
    ("runtime/onnx_runtime.py", BASE, "onnxruntime"),
    ("runtime/adapters/*", f"runtime.{{adapters,bundle}} {BASE}", "numpy"),
    ("runtime/bundle/*", f"runtime.{{bundle,graphs}} {BASE}", "numpy"),
    ("runtime/cli/*", "runtime", "click"),
    ("runtime/cli/build.py", "engine runtime", "click"),
    ("runtime/cli/export.py", "export runtime", "click"),
    ("runtime/cli/info.py", "engine runtime", "click"),
    ("runtime/cli/plans.py", "engine runtime", "click"),
    ("runtime/cli/verify.py", "export runtime", "click"),
    ("runtime/denoising/*", f"runtime.{{bundle,denoising,pictures,schedulers,sessions}} {BASE}", "numpy"),
    ("runtime/diagnostics/*", "runtime", "numpy"),
    ("runtime/families/*", "runtime", "numpy"),
    ("runtime/graphs/*", f"runtime.graphs {BASE}", "numpy"),
    ("runtime/pictures/*", f"runtime.{{bundle,pictures,sessions}} {BASE}", "numpy PIL"),
    ("runtime/pictures/edges.py", BASE, "PIL cv2 numpy"),
    ("runtime/schedulers/*", f"runtime.schedulers {BASE}", "numpy"),
    ("runtime/sessions/*", f"runtime.{{bundle,graphs,sessions}} {BASE}", "numpy"),
    ("runtime/sessions/cuda.py", f"runtime.{{bundle,sessions}} {BASE}", "cuda numpy"),
    (
        "runtime/sessions/libraries.py",
        f"runtime.{{bundle,sessions}} {BASE}",
        "numpy tensorrt tensorrt_lean tensorrt_rtx",
    ),
    ("runtime/sessions/onnxruntime_*.py", f"runtime.{{bundle,graphs,sessions}} {ORT} {BASE}", "numpy"),
    ("runtime/cli/serve.py", "runtime serving", "click"),
    ("serving/*", "runtime serving", "numpy"),
    ("serving/workers/*", f"runtime {WORKERS}", "numpy"),
    ("serving/http/*", f"runtime {HTTP}", ""),
    ("serving/openai/*", f"runtime {OPENAI}", ""),
    ("serving/webui/*", f"runtime {WEBUI}", ""),
    ("serving/workers/batcher.py", f"{WORKERS} runtime.denoising {BASE}", ""),
    ("serving/workers/entry.py", f"{WORKERS} runtime.denoising {BASE}", ""),
    ("serving/workers/costs.py", f"{WORKERS} {BASE}", ""),
    ("serving/workers/filters.py", f"{WORKERS} {BASE}", "numpy PIL"),
    ("serving/http/images.py", f"runtime {HTTP}", "PIL"),
    ("serving/http/controls.py", f"runtime.control runtime.pictures {HTTP} {BASE}", "PIL"),
    ("serving/http/answers.py", f"{HTTP} {BASE}", "fastapi starlette"),
    ("serving/app.py", f"serving {BASE}", "fastapi starlette"),
    ("serving/http/bodies.py", f"{HTTP} {BASE}", "starlette"),
    ("serving/http/connections.py", f"{HTTP} {BASE}", "h11 uvicorn"),
    ("serving/http/drawing.py", f"{HTTP} runtime.request {BASE}", "starlette"),
    ("serving/http/events.py", f"{HTTP} {BASE}", "starlette"),
    ("serving/http/health.py", f"{HTTP} {BASE}", "fastapi pydantic"),
    ("serving/http/kept.py", f"{HTTP} {BASE}", ""),
    ("serving/http/keys.py", f"{HTTP} {BASE}", ""),
    ("serving/http/logs.py", f"{HTTP} {BASE}", "prometheus_client starlette"),
    ("serving/admin_api.py", f"runtime {OPENAI}", "fastapi pydantic starlette"),
    ("serving/openai/api.py", f"runtime {OPENAI}", "fastapi pydantic starlette"),
    ("serving/webui/api.py", f"runtime {WEBUI}", "fastapi pydantic starlette"),
    ("serving/openai/answers.py", f"{OPENAI} {BASE}", "fastapi"),
    ("serving/openai/fields.py", f"runtime {OPENAI}", "PIL fastapi pydantic"),
    ("serving/openai/form.py", f"{OPENAI} {BASE}", "PIL fastapi pydantic starlette"),
    ("serving/openai/schema.py", f"{OPENAI} {BASE}", "pydantic"),
    ("serving/http/metrics.py", f"{HTTP} {BASE}", "fastapi prometheus_client"),
    ("serving/http/security.py", f"{HTTP} {BASE}", "starlette"),
    ("serving/http/limits.py", f"{HTTP} runtime.bundle runtime.request {BASE}", ""),
    ("serving/page.py", f"runtime {WEBUI}", "fastapi pydantic"),
    ("serving/webui/controlnet.py", f"runtime.control runtime.pictures {WEBUI} {BASE}", "fastapi pydantic"),
    ("serving/webui/fields.py", f"{WEBUI} {BASE}", "pydantic"),
    ("serving/webui/pictures.py", f"runtime.pictures {WEBUI} {BASE}", "numpy PIL"),
    ("serving/server.py", "runtime serving", "fastapi uvicorn"),
    ("runtime/text/*", f"runtime.{{adapters,bundle,sessions,text}} {BASE}", "numpy tokenizers"),
]


# What everything else is behind.
DOORS = ("runtime/__init__.py", "runtime/__main__.py")


def files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(relative: str, *, types: bool = True) -> set[str]:
    """The modules that a file imports, literal ``import_module`` too; without ``types``, those it needs to run."""
    found: set[str] = set()
    for node in walk(ast.parse((ROOT / relative).read_text()), types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if path_of(name)}
            found |= modules if modules == inside else {node.module, *modules}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def walk(node: ast.AST, types: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk(child, types)


def expanded(names: str) -> set[str]:
    """``a.{b,c}`` is ``a.b`` and ``a.c``."""
    found = set()
    for name in names.split():
        head, _, rest = name.partition("{")
        found |= {head + item for item in rest.removesuffix("}").split(",")}
    return found


@pytest.mark.parametrize("relative", files())
def test_no_file_imports_what_its_room_may_not(relative: str) -> None:
    ours, others = next((expanded(a), set(b.split())) for glob, a, b in reversed(WALLS) if fnmatch(relative, glob))
    for name in imports(relative):
        top, _, rest = name.partition(".")
        if top == "calotype":
            assert any(f"{rest}.".startswith(f"{allowed}.") for allowed in ours), f"{relative} imports {name}"
        else:
            assert top in sys.stdlib_module_names or top in others, f"{relative} imports {name}"


def test_no_imports_go_in_a_circle() -> None:
    """Between packages, when modules are loaded: what a function imports when it is called is no climb."""
    arrows: dict[str, set[str]] = {}
    for relative in files():
        if relative.startswith(("runtime/cli/", "calotype/")) or relative in DOORS:
            continue
        at_load = {
            name
            for name in imports(relative, types=False)
            if name.startswith("calotype.") and f"\n    from {name} import" not in (ROOT / relative).read_text()
        }
        own = place(relative)
        arrows.setdefault(own, set()).update(place(found) for found in map(path_of, at_load) if found)
    for start in arrows:
        arrows[start].discard(start)
    ordered: list[str] = []
    while len(ordered) < len(arrows):
        free = [name for name in arrows if name not in ordered and arrows[name] <= set(ordered)]
        rest = {name: sorted(arrows[name] - set(ordered)) for name in arrows if name not in ordered}
        assert free, f"these import each other: {rest}"
        ordered += free


def path_of(name: str) -> str | None:
    relative = name.removeprefix("calotype.").replace(".", "/")
    return next((found for found in (f"{relative}.py", f"{relative}/__init__.py") if (ROOT / found).exists()), None)


def place(relative: str) -> str:
    """The package of a file; at the top of a room the file itself."""
    parts = relative.split("/")
    return relative if len(parts) == 2 else "/".join(parts[:-1])


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["calotype", *path.parent.relative_to(ROOT).parts]).removeprefix("calotype.calotype.")
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == {"calotype" if name == "calotype.calotype" else name for name in found}
    assert all((ROOT / room / "py.typed").exists() for room in ROOMS)


def test_the_runtime_and_the_command_line_work_without_pytorch() -> None:
    """Every module of the runtime that needs no GPU's package is imported, and a picture's options are listed."""
    script = """
import importlib, sys
for name in ("torch", "onnx", "transformers", "diffusers", "safetensors"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
from calotype.runtime.cli.main import run
assert not run(["generate", "--help"])
"""
    gpu = ("onnxruntime_cuda", "__main__")
    modules = [
        ".".join(("calotype", *Path(relative).with_suffix("").parts)).removesuffix(".__init__")
        for relative in files()
        if relative.startswith("runtime/") and not Path(relative).stem.endswith(gpu)
    ]
    subprocess.run([sys.executable, "-c", script, *modules], check=True, capture_output=True)
