"""ControlNets beyond the CPU's sessions: real TensorRT-RTX plans, which need no GPU, and runs over stand-ins."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.engine import winograd
from calotype.engine.build import build_bundle
from calotype.engine.cpu import build_engines
from calotype.engine.profiles import Range, default_profile
from calotype.export.bundle import export_checkpoint
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.control import Control
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.graphs.layouts import Layouts
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.sessions import onnxruntime_cuda
from calotype.runtime.sessions.plans import describe_plan
from tests import computing_standins
from tests.controlnets import write_controlnet
from tests.runtime.conftest import Model
from tests.runtime.cuda_standin import Cuda
from tests.runtime.lora_files import UNET, write_lora
from tests.runtime.references import psnr


def build(bundle: Bundle, network: str, pixels: int) -> list[str]:
    """Build a plan of sizes around ``pixels``, and give its inputs."""
    sides = Range(min=pixels // 2, opt=pixels, max=pixels)
    profile = dataclasses.replace(default_profile(bundle.manifest), height=sides, width=sides)
    plans = build_bundle(bundle, backend="tensorrt-rtx", profiles=[profile], networks=[network])
    record, spec = describe_plan(plans[network]), bundle.manifest.networks[network]
    assert [item["name"] for item in record.tensors["outputs"]] == [item.name for item in spec.outputs]
    names = [item["name"] for item in record.tensors["inputs"]]
    assert names == [item.name for item in spec.inputs]
    return names


def test_a_unet_with_control_inputs_and_a_controlnet_build(
    tiny_bundle: Path, controlnets: tuple[Model, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    names = build(Bundle.open(tiny_bundle), "unet_control", 64)
    assert names[-5:] == ["down_residual_0", "down_residual_1", "down_residual_2", "down_residual_3", "mid_residual"]
    assert "control_image" in build(Bundle.open(controlnets[0].bundle), "controlnet", 64)


@pytest.mark.slow
def test_a_controlnet_of_stable_diffusion_1_5_s_width_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    export_checkpoint(write_controlnet(tmp_path / "source", cross_attention_dim=768), tmp_path / "bundle")
    assert "control_image" in build(Bundle.open(tmp_path / "bundle"), "controlnet", 512)


def test_an_engine_of_the_cpu_takes_loras_with_controls(
    tiny_bundle: Path, controlnets: tuple[Model, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path))
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)
    lora = write_lora(tmp_path / "a.safetensors", 1, (UNET,), bundle=tiny_bundle)
    noise = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    control = Control(model="one", image=Image.fromarray(noise))
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "height": 32, "width": 48, "output_type": "np"}

    def draw() -> tuple[Path | None, list[Any]]:
        with Pipeline.load(tiny_bundle, "cpu", controls={"one": controlnets[0].bundle}) as pipeline:
            sets: tuple[list[Path], ...] = ([], [lora], [])
            found = [pipeline("a", controls=[control], loras=loras, **settings).images[0] for loras in sets]
            return pipeline.engines["unet_control"], found

    engine, wanted = draw()
    assert engine is None
    build_engines(Bundle.open(tiny_bundle), networks=["unet_control"])
    engine, got = draw()
    assert engine is not None
    read = Layouts.read(engine.read_bytes())
    assert read is not None
    assert {own.tensor for own in read.of.values()} == set(SafetensorsFile(tiny_bundle / "unet.safetensors"))
    assert {step for own in read.of.values() for step, _ in own.steps} >= {"transpose", "spread"}
    for one, other in zip(got, wanted, strict=True):
        assert psnr(one, other) >= 60
    assert psnr(got[1], got[0]) < 45
    assert got[2].tobytes() == got[0].tobytes()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A GPU whose memory is the host's, and ONNX Runtime on it."""
    standin = Cuda()
    standin.limit = computing_standins.GPU_MEMORY
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", standin)  # type: ignore[arg-type]
    monkeypatch.setattr(onnxruntime_cuda, "onnxruntime", computing_standins.OnnxRuntime)
    yield standin
    gc.collect()
    assert (standin.device, standin.host, standin.streams) == ({}, {}, set())


def test_what_one_controlnet_makes_stays_on_the_gpu(
    tiny_bundle: Path, controlnets: tuple[Model, ...], cuda: Cuda
) -> None:
    """Its residuals are copied there, and to the host where several are added up; unused inputs are copied once."""
    noise = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    one = Control(model="one", image=Image.fromarray(noise))
    request = Request(prompt="a", seed=3, num_inference_steps=6, height=32, width=48, guidance_scale=3.0)
    exactly = Acceleration(precision="float32")
    folders = {name: model.bundle for name, model in zip(("one", "two"), controlnets, strict=False)}

    def copies(*controls: Control) -> list[dict[str, int]]:
        """Copies of each step, by direction."""
        job, found = pipeline.prepare(dataclasses.replace(request, controls=controls)), []
        while not job.done:
            cuda.copied.clear()
            pipeline.step([job])
            counted = Counter[str]()
            for (kind, _), count in cuda.copied.items():
                counted[kind.name.removeprefix("cudaMemcpy")] += count
            found.append(dict(counted))
        return found

    with Pipeline.load(tiny_bundle, "cuda", controls=folders, fast=exactly) as pipeline:
        residuals = 5
        lone = copies(one)
        # In: sample and timestep of both; out: the prediction.
        assert lone[2] == {"HostToDevice": 4, "DeviceToDevice": residuals, "DeviceToHost": 1}
        two = copies(one, dataclasses.replace(one, model="two"))
        assert two[2] == {"HostToDevice": 2 + 2 * 2 + residuals, "DeviceToHost": 1 + 2 * residuals}
        ending = copies(dataclasses.replace(one, end=0.5))
        assert ending[2] == lone[2]
        assert ending[3] == {"HostToDevice": 2 + residuals, "DeviceToHost": 1}  # zeros
        assert ending[4] == {"HostToDevice": 2, "DeviceToHost": 1}


@pytest.mark.usefixtures("cuda")
def test_pictures_over_the_stand_in_for_cuda_equal_the_cpu_s(tiny_bundle: Path, controlnets: tuple[Model, ...]) -> None:
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)) for _ in range(2)]
    controls = [
        Control(model="one", image=pictures[0], end=0.7),
        Control(model="two", image=pictures[1], scale=0.5, guess=True),
    ]
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "height": 32, "width": 48, "output_type": "np"}
    folders = {name: model.bundle for name, model in zip(("one", "two"), controlnets, strict=False)}
    drawn = {}
    for backend in ("cpu", "cuda"):
        exactly = Acceleration(precision="float32")
        with Pipeline.load(tiny_bundle, backend, controls=folders, fast=exactly) as pipeline:
            drawn[backend] = pipeline(["a", "red apple"], controls=controls, **settings).images
            without = pipeline("a", **settings).images[0]
    for one, other in zip(drawn["cpu"], drawn["cuda"], strict=True):
        assert psnr(one, other) >= 60
    assert psnr(drawn["cuda"][0], without) < 50
