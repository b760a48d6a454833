"""The CPU session: weights given in place of the file's, buffers, and what a step costs beside the engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import BackendError
from calotype.runtime.sessions import open_session
from calotype.runtime.sessions.session import Session

TALBOT = Bundle.open("talbot")
SIZES = {"rows": 2, "tokens": 5, "height": 8, "width": 12}


def output(session: Session) -> NDArray[Any]:
    rng = np.random.default_rng(3)
    session.reserve(SIZES)
    for spec in session.inputs:
        session.buffer(spec.name, SIZES)[:] = rng.standard_normal(spec.resolve(SIZES))
    session.run(SIZES)
    return session.buffer("noise_pred", SIZES).copy()


def changed(weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A convolution, a linear layer and a bias, another value each, in the dtype of the file."""
    names = ["conv_in.weight", next(name for name in weights if name.endswith("attn2.to_k.weight")), "conv_out.bias"]
    return {name: (weights[name].astype(np.float32) * 1.5 + 0.25).astype(weights[name].dtype) for name in names}


def test_overrides_equal_a_file_with_those_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    spec = Manifest.read(tiny_bundle).networks["unet"]
    weights = load_file(tiny_bundle / "unet.safetensors")
    overrides = changed(weights)
    shutil.copy(tiny_bundle / spec.graphs["float32"], tmp_path)
    data = (tiny_bundle / "unet.safetensors").read_bytes()
    for name, value in overrides.items():
        assert data.count(weights[name].tobytes()) == 1
        data = data.replace(weights[name].tobytes(), value.tobytes())
    (tmp_path / "unet.safetensors").write_bytes(data)
    with open_session(tmp_path, spec, "cpu") as session:
        expected = output(session)
    with open_session(tiny_bundle, spec, "cpu", overrides) as session:
        for value in overrides.values():
            value[:] = np.nan  # ONNX Runtime has its own copy
        got = output(session)
    with open_session(tiny_bundle, spec, "cpu") as session:
        plain = output(session)
    np.testing.assert_array_equal(got, expected)
    assert np.abs(got - plain).max() > 0.01


def test_an_override_that_the_graph_does_not_read_changes_nothing(tiny_bundle: Path) -> None:
    spec = Manifest.read(tiny_bundle).networks["unet"]
    with open_session(tiny_bundle, spec, "cpu") as session:
        plain = output(session)
    with open_session(tiny_bundle, spec, "cpu", {"nothing.weight": np.zeros(3, np.float16)}) as session:
        np.testing.assert_array_equal(output(session), plain)


def test_an_override_of_another_shape_is_an_error(tiny_bundle: Path) -> None:
    spec = Manifest.read(tiny_bundle).networks["unet"]
    with pytest.raises(BackendError, match=r"cannot open unet\.fp32\.onnx: .*dimensions do not match"):
        open_session(tiny_bundle, spec, "cpu", {"conv_out.bias": np.zeros(3, np.float16)})


def test_a_run_allocates_nothing_after_the_first() -> None:
    with open_session(TALBOT.path, TALBOT.manifest.networks["unet"], "cpu") as session:
        session.reserve(SIZES)
        session.run(SIZES)
        tracemalloc.start()
        try:
            for _ in range(5):
                session.buffer("sample", SIZES)
                session.run(SIZES)
            assert tracemalloc.get_traced_memory()[1] < 2048  # Python's own small objects
        finally:
            tracemalloc.stop()


def test_a_second_run_takes_no_more_memory() -> None:
    """In a process of its own; ONNX Runtime's memory pattern would take all that the first one did once more."""
    program = """
import numpy as np
from calotype.runtime.pipeline import Pipeline
from pathlib import Path

def own():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

with Pipeline.load("talbot", "cpu") as pipeline:
    found = [own()]
    for _ in range(2):
        pipeline("apple", height=256, width=256, num_inference_steps=1, output_type="np")
        found.append(own())
print(*np.diff(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    first, second = map(int, done.stdout.split())
    assert second < 0.2 * first


def test_too_little_memory_says_what_to_do() -> None:
    """In a process of its own, which may have 20 MB more than it has once the model is open."""
    program = """
import resource
from pathlib import Path
from calotype.runtime.errors import BackendError
from calotype.runtime.pipeline import Pipeline

with Pipeline.load("talbot", "cpu") as pipeline:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 20_000_000,) * 2)
    try:
        pipeline("apple", height=1024, width=1024, num_inference_steps=1)
    except BackendError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.startswith(
        "there is not enough memory to run at rows=2, height=128, width=128, tokens=32; use a "
    )
    assert done.stdout.count("\n") == 1
    assert "onnxruntime" not in done.stderr
