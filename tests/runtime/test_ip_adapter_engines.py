"""Image prompts beyond the CPU's sessions: real TensorRT-RTX plans, which need no GPU, and runs over stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calotype.engine import winograd
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.control import Control
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.graphs.layouts import Layouts
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.pipeline import Pipeline
from tests.runtime.conftest import Model
from tests.runtime.lora_files import UNET, write_lora
from tests.runtime.references import psnr
from tests.runtime.test_controlnet_engines import build
from tests.runtime.test_controlnet_engines import cuda as cuda
from tests.runtime.test_ip_adapter import picture

SETTINGS: dict[str, Any] = {"seed": 3, "height": 32, "width": 48, "output_type": "np"}


def test_a_unet_with_image_prompt_inputs_and_an_ip_adapter_build(
    tiny_bundle: Path, ip_adapters: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    names = build(Bundle.open(tiny_bundle), "unet_image_prompt", 64)
    assert names[-3:] == ["up_1_image_keys", "up_1_image_values", "image_bias"]
    adapter = Bundle.open(ip_adapters["plus"].bundle)
    for network in ("image_encoder", "image_projection", "image_keys_values"):
        assert len(build(adapter, network, 64)) == 1


def test_an_engine_of_the_cpu_takes_loras_with_image_prompts(
    tiny_bundle: Path, ip_adapters: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path))
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)
    lora = write_lora(tmp_path / "a.safetensors", 1, (UNET,), bundle=tiny_bundle)
    folders = {kind: ip_adapters[kind].bundle for kind in ("plain", "plus")}
    prompts = [ImagePrompt(model=kind, images=(picture(seed),)) for seed, kind in enumerate(folders)]

    def draw() -> tuple[Path | None, list[Any]]:
        with Pipeline.load(tiny_bundle, "cpu", image_prompts=folders) as pipeline:
            sets: tuple[list[Path], ...] = ([], [lora], [])
            more = {"num_inference_steps": 2, "image_prompts": prompts, **SETTINGS}
            found = [pipeline("a", loras=loras, **more).images[0] for loras in sets]
            return pipeline.engines["unet_image_prompt"], found

    engine, wanted = draw()
    assert engine is None
    build_engines(Bundle.open(tiny_bundle), networks=["unet_image_prompt"])
    engine, got = draw()
    assert engine is not None
    read = Layouts.read(engine.read_bytes())
    assert read is not None
    assert {own.tensor for own in read.of.values()} == set(SafetensorsFile(tiny_bundle / "unet.safetensors"))
    for one, other in zip(got, wanted, strict=True):
        assert psnr(one, other) >= 60
    assert psnr(got[1], got[0]) < 45
    assert got[2].tobytes() == got[0].tobytes()


@pytest.mark.usefixtures("cuda")
def test_pictures_over_the_stand_in_for_cuda_equal_the_cpu_s(
    tiny_bundle: Path, ip_adapters: dict[str, Model], controlnets: tuple[Model, ...]
) -> None:
    folders = {kind: ip_adapters[kind].bundle for kind in ("plain", "plus")}
    prompts = [ImagePrompt(model=kind, images=(picture(seed),), scale=0.8) for seed, kind in enumerate(folders)]
    controls = [Control(model="one", image=picture(3), end=0.7)]
    drawn, without = {}, {}
    for backend in ("cpu", "cuda"):
        exactly, control = Acceleration(precision="float32"), {"one": controlnets[0].bundle}
        with Pipeline.load(tiny_bundle, backend, image_prompts=folders, controls=control, fast=exactly) as pipeline:
            more = {"num_inference_steps": 4, **SETTINGS}
            drawn[backend] = pipeline(["a", "red apple"], image_prompts=prompts, controls=controls, **more).images
            without[backend] = pipeline("a", **more).images[0]
            alone = pipeline("a", image_prompts=prompts[:1], **more).images[0]
    for one, other in zip(drawn["cpu"], drawn["cuda"], strict=True):
        assert psnr(one, other) >= 60
    assert psnr(drawn["cuda"][0], without["cuda"]) < 50
    assert psnr(alone, without["cuda"]) < 50
