"""ONNX Runtime leaves nothing behind in the user's folders, and no other import of it is among the sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calotype.runtime import onnx_runtime
from calotype.runtime.errors import MissingPackageError

PROGRAM = """
import os
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.sessions import open_session

bundle, sizes = Bundle.open("talbot"), {"rows": 1, "tokens": 32, "height": 2, "width": 2}
with open_session(bundle.path, bundle.manifest.networks["unet_shallow"], "cpu") as session:
    session.run(sizes)
import calotype.engine.cpu
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize("chosen", [None, "0"])
def test_nothing_is_left_behind_unless_a_user_wants_it(chosen: str | None, tmp_path: Path) -> None:
    """ONNX Runtime's own variable is obeyed, and otherwise set while it is imported alone."""
    environment = {**os.environ, "HOME": str(tmp_path), "CALOTYPE_CACHE": str(tmp_path / "own")}
    environment |= {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
    environment.pop(onnx_runtime.TELEMETRY_OFF, None)
    if chosen is not None:
        environment[onnx_runtime.TELEMETRY_OFF] = chosen
    command = [sys.executable, "-B", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() == str(chosen)
    if chosen is None:
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_the_package_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # type: ignore[arg-type]
    monkeypatch.delenv(onnx_runtime.TELEMETRY_OFF, raising=False)
    with pytest.raises(MissingPackageError, match=r"onnxruntime-gpu is not installed; .* -m pip install .*\[cuda\]"):
        onnx_runtime.import_onnxruntime("onnxruntime-gpu", "cuda")
    assert onnx_runtime.TELEMETRY_OFF not in os.environ
