"""The tests that need a GPU run to their end over stand-ins that compute on the CPU: no typo is left for the GPU."""

from __future__ import annotations

import subprocess
import sys


def test_each_passes_or_says_why_not() -> None:
    chosen = ["-m", "gpu and not slow", "-k", "cuda or tensorrt-rtx or version_compatible"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.computing_standins", *chosen, "-rs", "tests/gpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout
    reasons = [line.partition(": ")[2] for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert {reason.partition(": ")[2] or reason for reason in reasons} == {
        "ONNX Runtime has no plans",
        "plans for later versions are TensorRT's",
    }
