"""Sets of LoRAs on GPUs, over stand-ins: each has a session of its own, and nothing of one is left in another."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.engine.build import Options
from calotype.runtime.adapters.lora import Lora
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import BackendError
from calotype.runtime.merged_weights import MergedWeights
from calotype.runtime.networks import Networks
from calotype.runtime.sessions import libraries, onnxruntime_cuda
from tests.runtime import cuda_standin
from tests.runtime.cuda_standin import Cuda
from tests.runtime.lora_files import UNET, write_lora
from tests.runtime.sessions.test_cuda_standin import BUNDLE, SIZES, keep_plan, network
from tests.runtime.sessions.test_onnxruntime_cuda import OnnxRuntime, SessionOptions

MODULES = {UNET: ("conv_out",)}


class WeightedOptions(SessionOptions):
    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}

    def add_external_initializers(self, names: Sequence[str], values: Sequence[Any]) -> None:
        self.weights |= dict(zip(names, values, strict=True))


class OrtValue:
    @staticmethod
    def ortvalue_from_numpy(value: Any) -> Any:
        return value.copy()


class WeightedOnnxRuntime(OnnxRuntime):
    """Adds the weights that a session was opened with to what it computes."""

    SessionOptions, OrtValue = WeightedOptions, OrtValue

    def InferenceSession(self, graph: bytes, options: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        super().InferenceSession(graph, options, providers, enable_fallback)
        return Opened(self, sum(float(np.abs(value).sum()) for value in options.weights.values()))


class Opened:
    def __init__(self, library: OnnxRuntime, shift: float) -> None:
        self.library, self.shift, self.graphs = library, shift, dict[str, int]()
        self.get_providers, self.io_binding = library.get_providers, library.io_binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.library.graphs = self.graphs  # of this session
        self.library.run_with_iobinding(binding, options)
        self.library.array(binding, "noise_pred")[...] += self.shift


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of the test's own."""
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> cuda_standin.Library:
    specs = [spec for item in BUNDLE.manifest.networks.values() for spec in (*item.inputs, *item.outputs)]
    standin = cuda_standin.Library(cuda, network, {spec.name: spec.dtype for spec in specs})
    standin.weighted = True
    own = SafetensorsFile(BUNDLE.path / f"{UNET}.safetensors")
    standin.base = {name: np.array(own[name]) for name in standin.refittable}
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", standin)  # type: ignore[arg-type]
    monkeypatch.setitem(libraries.MODULES, "tensorrt", ("no_such_module",))
    return standin


def drawn(networks: Networks, loras: tuple[Lora, ...]) -> bytes:
    session = networks.session(networks.key(UNET, networks.form(UNET, loras=loras), loras))
    session.reserve(SIZES)
    session.buffer("sample", SIZES)[:] = 0.25
    session.buffer("timestep", SIZES)[:] = 3
    session.run(SIZES)
    return session.buffer("noise_pred", SIZES).tobytes()


def check_a_b_a(backend: str, folder: Path, memory: int) -> tuple[int, dict[tuple[Lora, ...], bytes]]:
    """A, B and the model's own in any order give the same bytes each time.

    Returns how many sessions stay open, and what each gave.
    """
    a, b = ((Lora(path=write_lora(folder / f"{seed}.safetensors", seed, (UNET,), modules=MODULES)),) for seed in (1, 2))
    networks = Networks(BUNDLE, backend, denoiser=UNET, encoders=("text_encoder",), lora_memory=memory)
    try:
        wanted = {loras: drawn(networks, loras) for loras in ((), a, b)}
        assert len(set(wanted.values())) == 3
        for loras in (a, b, a, (), b, (), a, (), ()):
            assert drawn(networks, loras) == wanted[loras]
        if memory:
            assert networks.kept_bytes > 0
        return len(networks.sessions), wanted
    finally:
        networks.close()


@pytest.mark.parametrize(("memory", "kept"), [(1 << 30, 3), (0, 1)])
def test_onnx_runtime(memory: int, kept: int, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin = WeightedOnnxRuntime(cuda)
    monkeypatch.setattr(onnxruntime_cuda, "onnxruntime", standin)
    assert check_a_b_a("cuda", tmp_path, memory)[0] == kept
    assert len(standin.opened) == (3 if memory else 11)


def test_plans_are_refitted_and_give_what_fresh_ones_give(library: cuda_standin.Library, tmp_path: Path) -> None:
    """Within the memory each set has a plan, opened once; without, one is opened, and refitted for each switch."""
    keep_plan(options=Options(precision="float16", strip_weights=True), precision="float16")
    kept, fresh = check_a_b_a("tensorrt-rtx", tmp_path, 1 << 30)
    assert (kept, library.deserialized, library.open) == (3, 3, 0)
    assert library.refitted["from"] == str(BUNDLE.path / BUNDLE.manifest.networks[UNET].graphs["float16"])
    kept, refitted = check_a_b_a("tensorrt-rtx", tmp_path, 0)
    assert (kept, library.deserialized, library.open) == (1, 4, 0)
    assert library.refitted.keys() == {"conv_out.weight"}  # of the last switch: nothing else was read or copied
    assert list(refitted.values()) == list(fresh.values())


def test_weights_that_are_in_one_kernel_are_refitted_together(library: cuda_standin.Library, tmp_path: Path) -> None:
    library.partners = {"conv_out.weight": "conv_in.weight"}
    keep_plan(options=Options(precision="float16", strip_weights=True), precision="float16")
    check_a_b_a("tensorrt-rtx", tmp_path, 0)
    assert library.deserialized == 1
    assert library.refitted.keys() == {"conv_out.weight", "conv_in.weight"}


def test_a_refit_that_fails_leaves_the_weights_of_before(
    library: cuda_standin.Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The session itself is as it was; a pipeline opens another, and where that fails too, nothing else is lost."""
    keep_plan(options=Options(precision="float16", strip_weights=True), precision="float16")
    path = write_lora(tmp_path / "a.safetensors", 1, (UNET,), modules=MODULES)
    networks = Networks(BUNDLE, "tensorrt-rtx", denoiser=UNET, encoders=("text_encoder",), lora_memory=0)
    try:
        base = drawn(networks, ())
        session = networks.session(networks.key(UNET, networks.form(UNET)))
        library.refused = "conv_out.weight"
        with pytest.raises(BackendError, match=r"cannot change the weights conv_out\.weight"):
            session.set_weights(MergedWeights(BUNDLE, [UNET]).merged((Lora(path=path),))[UNET])
        assert drawn(networks, ()) == base
        with pytest.raises(BackendError, match=r"cannot change the weights conv_out\.weight"):
            drawn(networks, (Lora(path=path),))
        assert "is opened anew for other weights" in caplog.text
        library.refused = ""
        changed = drawn(networks, (Lora(path=path),))
        assert changed != base == drawn(networks, ())
    finally:
        networks.close()
    gc.collect()  # the errors, which hold what they passed
    assert library.open == 0


def test_a_plan_that_would_take_a_part_of_a_lora_takes_none(library: cuda_standin.Library, tmp_path: Path) -> None:
    """TensorRT's refit has dropped weights silently."""
    library.refittable = ["conv_in.weight"]
    keep_plan(options=Options(precision="float16", strip_weights=True), precision="float16")
    with pytest.raises(BackendError, match=r"cannot change the weights conv_out\.weight, which a LoRA changes"):
        check_a_b_a("tensorrt-rtx", tmp_path, 0)


@pytest.mark.usefixtures("library")
def test_a_plan_with_weights_of_its_own_says_what_to_build(tmp_path: Path) -> None:
    keep_plan(options=Options(precision="float16"), precision="float16")
    with pytest.raises(BackendError, match=r"as a LoRA needs; .*--strip-weights"):
        check_a_b_a("tensorrt-rtx", tmp_path, 0)
