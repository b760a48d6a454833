"""SDXL, its distilled forms, and latent consistency models, against diffusers' own pipelines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import scale_embedding
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.pipeline import Pipeline
from tests.runtime.conftest import Model
from tests.runtime.references import diffusers_pipeline, draws, injected, psnr


@pytest.fixture(scope="module")
def pipeline(sdxl: Model) -> Any:
    with Pipeline.load(sdxl.bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "settings",
    [
        {"negative_prompt": "le"},
        {},
        {"negative_prompt": "le", "guidance_rescale": 0.7},
        {
            "negative_prompt": "le",
            "original_size": (100, 200),
            "crops_coords_top_left": (3, 5),
            "target_size": (64, 80),
        },
        {"guidance_scale": 0.0, "num_inference_steps": 1},
        {"guidance_scale": 1.0, "num_inference_steps": 4, "clip_skip": 1},
    ],
)
def test_equals_diffusers_to_50_db(pipeline: Pipeline, sdxl: Model, settings: dict[str, Any]) -> None:
    settings = {"num_inference_steps": 6, "guidance_scale": 4.0, "height": 32, "width": 48, **settings}
    reference = diffusers_pipeline(sdxl.checkpoint, "StableDiffusionXLPipeline")
    noise = draws(5, (4, 16, 24), 1)[0]
    with injected(reference, noise=noise):
        expected = reference("red apple", output_type="np", **settings).images[0]
    got = pipeline("red apple", output_type="np", seed=5, **settings).images[0]
    assert got.std() > 0.01
    assert psnr(got, expected) >= 50


def test_image_to_image_equals_diffusers_to_50_db(pipeline: Pipeline, sdxl: Model, picture: Image.Image) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "strength": 0.5}
    reference = diffusers_pipeline(sdxl.checkpoint, "StableDiffusionXLImg2ImgPipeline")
    noise, posterior = draws(5, (4, 16, 24), 2)
    with injected(reference, noise=noise, posteriors=[posterior]):
        expected = reference("red apple", image=picture, output_type="np", **settings).images[0]
    got = pipeline("red apple", image=picture, output_type="np", seed=5, **settings).images[0]
    assert psnr(got, expected) >= 50


def test_inpainting_equals_diffusers_to_50_db(pipeline: Pipeline, sdxl: Model, picture: Image.Image) -> None:
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 6, 32, 24))
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "strength": 0.7}
    reference = diffusers_pipeline(sdxl.checkpoint, "StableDiffusionXLInpaintPipeline")
    noise, posterior, unused = draws(5, (4, 16, 24), 3)
    with injected(reference, noise=noise, posteriors=[posterior, unused]):
        expected = reference(
            "red apple", image=picture, mask_image=mask, height=32, width=48, output_type="np", **settings
        ).images[0]
    got = pipeline("red apple", image=picture, mask_image=mask, output_type="np", seed=5, **settings).images[0]
    inside = np.asarray(mask) > 0
    assert psnr(got[inside], expected[inside]) >= 50


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_nine_channels_equals_diffusers_to_50_db(
    sdxl_inpainting: Model, picture: Image.Image, strength: float
) -> None:
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 6, 32, 24))
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "strength": strength}
    settings["negative_prompt"] = "le"
    reference = diffusers_pipeline(sdxl_inpainting.checkpoint, "StableDiffusionXLInpaintPipeline")
    noise, first, second = draws(5, (4, 16, 24), 3)
    with injected(reference, noise=noise, posteriors=[first] if strength == 1 else [first, second]):
        expected = reference(
            "red apple", image=picture, mask_image=mask, height=32, width=48, output_type="np", **settings
        ).images[0]
    with Pipeline.load(sdxl_inpainting.bundle) as opened:
        got = opened("red apple", image=picture, mask_image=mask, output_type="np", seed=5, **settings).images[0]
    inside = np.asarray(mask) > 0
    assert got[inside].std() > 0.01
    assert psnr(got[inside], expected[inside]) >= 50


@pytest.mark.parametrize(("steps", "strength"), [(1, None), (4, None), (2, 0.5)])
def test_turbo_models_equal_diffusers_to_50_db(
    pipeline: Pipeline, sdxl: Model, picture: Image.Image, steps: int, strength: float | None
) -> None:
    """SD-Turbo and SDXL-Turbo (Sauer et al. 2023, arXiv 2311.17042): few steps of Euler from the end, no guidance."""
    kind = "StableDiffusionXLPipeline" if strength is None else "StableDiffusionXLImg2ImgPipeline"
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "np"}
    settings |= {"height": 32, "width": 48} if strength is None else {"image": picture, "strength": strength}
    reference = diffusers_pipeline(sdxl.checkpoint, kind, "EulerDiscreteScheduler", timestep_spacing="trailing")
    noise, posterior = draws(5, (4, 16, 24), 2)
    with injected(reference, noise=noise, posteriors=[] if strength is None else [posterior]):
        expected = reference("red apple", **settings).images[0]
    got = pipeline("red apple", seed=5, scheduler_config={"timestep_spacing": "trailing"}, **settings).images[0]
    assert psnr(got, expected) >= 50


def test_the_pooled_embedding_of_a_long_prompt_is_its_first_chunks(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    original = Denoiser.run

    def record(self: Denoiser, jobs: Any) -> None:
        rows.extend(dict(job.conditional) for job in jobs)
        original(self, jobs)

    monkeypatch.setattr(Denoiser, "run", record)
    for prompt in ("apple " * 30, "apple " * 30 + "red red red"):
        pipeline(prompt, num_inference_steps=1, seed=0)
    short, long = rows
    assert short["encoder_hidden_states"].shape == (32, 56)
    assert long["encoder_hidden_states"].shape == (64, 56)
    assert (long["encoder_hidden_states"][:32] == short["encoder_hidden_states"]).all()
    assert (long["text_embeds"] == short["text_embeds"]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"original_size": 3}, r"original_size=3 is not a pair; give \(height, width\)"),
        ({"target_size": (8, 0)}, "target_size=0 is less than 1; use 1 or more"),
        ({"crops_coords_top_left": (-1, 0)}, "crops_coords_top_left=-1 is less than 0; use 0 or more"),
    ],
)
def test_bad_sizes_get_one_line(pipeline: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline("a", **settings)


def test_sizes_are_for_sdxl(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle) as opened, pytest.raises(InputError, match="target_size is for SDXL models"):
        opened("a", target_size=(8, 8))


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_lcm_equals_diffusers_to_50_db(lcm: Model, scale: float) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": scale, "height": 32, "width": 48}
    reference = diffusers_pipeline(lcm.checkpoint, "LatentConsistencyModelPipeline")
    noise, *steps = draws(5, (4, 16, 24), 4)
    with injected(reference, noise=noise, steps=steps):
        expected = reference("red apple", output_type="np", **settings).images[0]
    with Pipeline.load(lcm.bundle) as opened:
        got = opened("red apple", output_type="np", seed=5, **settings).images[0]
    assert got.std() > 0.01
    assert psnr(got, expected) >= 50


def test_the_scale_of_an_lcm_is_an_input_and_costs_no_row(lcm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = Denoiser.run

    def record(self: Denoiser, jobs: Any) -> None:
        rows.append(sum(job.rows for job in jobs))
        original(self, jobs)

    monkeypatch.setattr(Denoiser, "run", record)
    settings: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    with Pipeline.load(lcm.bundle) as opened:
        low, high = (opened("a", guidance_scale=scale, **settings).images[0] for scale in (2, 8))
    assert rows == [1] * 4
    assert (low != high).any()


def test_the_scale_embedding_is_diffusers() -> None:
    import torch
    from diffusers import LatentConsistencyModelPipeline

    for size in (24, 25, 256):
        expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([7.5 - 1]), size)
        assert np.abs(scale_embedding(7.5, size) - expected[0].numpy()).max() < 2e-3  # float32 angles up to 6500


def test_a_bundle_without_its_second_text_encoder_is_refused(sdxl: Model, tmp_path: Path) -> None:
    import json

    folder = tmp_path / "bundle"
    shutil.copytree(sdxl.bundle, folder)
    manifest = json.loads((folder / "calotype.json").read_text())
    del manifest["networks"]["text_encoder_2"], manifest["sha256"]
    (folder / "calotype.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has no text_encoder_2; export the bundle again"):
        Pipeline.load(folder)
