"""The pipeline, against diffusers' own on the same weights, and its promises."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.picture import StepEnd
from calotype.runtime.pipeline import Pipeline
from tests.runtime.references import diffusers_pipeline, psnr


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Any:
    with Pipeline.load(tiny_bundle) as opened:
        yield opened


@pytest.mark.parametrize(
    ("scheduler", "class_name", "config", "settings"),
    [
        ("ddim", "DDIMScheduler", {}, {}),
        ("euler", "EulerDiscreteScheduler", {}, {}),
        ("dpmpp-2m", "DPMSolverMultistepScheduler", {}, {}),
        ("ddim", "DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
        # SD-Turbo
        *(
            ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, few)
            for few in ({"num_inference_steps": 1, "guidance_scale": 0.0}, {"num_inference_steps": 4})
        ),
    ],
)
def test_equals_diffusers_to_50_db(
    pipeline: Pipeline,
    tiny_checkpoint: Path,
    scheduler: str,
    class_name: str,
    config: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    import torch

    reference = diffusers_pipeline(tiny_checkpoint, "StableDiffusionPipeline", class_name, **config)
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 24), np.float32)
    settings = {"num_inference_steps": 8, "guidance_scale": 4.0, "height": 32, "width": 48, **settings}
    settings |= {"negative_prompt": "le", "output_type": "np"}
    expected = reference("red apple", latents=torch.from_numpy(latents.copy()), **settings).images[0]
    settings |= {"scheduler": scheduler, "scheduler_config": config}
    got = pipeline("red apple", latents=latents, **settings).images[0]
    assert got.shape == expected.shape == (32, 48, 3)
    assert got.std() > 0.01
    assert psnr(got, expected) >= 50


def test_an_image_depends_on_its_seed_alone(pipeline: Pipeline, tiny_bundle: Path) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 3, "scheduler": "ddpm"}
    alone = pipeline("red apple", seed=7, **settings).images[0].tobytes()
    batch = pipeline("red apple", seed=5, num_images_per_prompt=4, **settings)
    assert batch.seeds == [5, 6, 7, 8]
    assert [image.tobytes() for image in batch.images].index(alone) == 2
    mixed = pipeline(["le", "red apple"], seed=6, **settings)
    assert mixed.images[1].tobytes() == alone
    with Pipeline.load(tiny_bundle) as again:
        assert again("red apple", seed=7, **settings).images[0].tobytes() == alone


def test_a_repeated_prompt_costs_no_text_encoder(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 1, "seed": 0, "output_type": "latent"}
    with Pipeline.load(tiny_bundle) as pipeline:
        encoder, runs = pipeline.networks.encoder("text_encoder"), []
        original = encoder.run

        def count(sizes: Any) -> None:
            runs.append(sizes)
            original(sizes)

        monkeypatch.setattr(encoder, "run", count)
        first = pipeline("red apple", **settings).images[0]
        assert len(runs) == 2  # the prompt, and the empty one
        again = pipeline("red apple", num_images_per_prompt=3, **settings).images[0]
        pipeline(["red apple", ""], guidance_scale=1, scheduler="euler", **settings)
        assert len(runs) == 2
        assert again.tobytes() == first.tobytes()
        pipeline("le apple", **settings)
        assert len(runs) == 3


def test_prompts_have_one_negative_prompt_or_each_its_own(pipeline: Pipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 2}
    prompts = ["red", "apple"]
    each = pipeline(prompts, negative_prompt=["le", "a"], num_images_per_prompt=2, seed=0, **settings).images
    shared = pipeline(prompts, negative_prompt="le", num_images_per_prompt=2, seed=0, **settings).images
    for index, (prompt, negative) in enumerate([("red", "le"), ("red", "le"), ("apple", "a"), ("apple", "a")]):
        alone = pipeline(prompt, negative_prompt=negative, seed=index, **settings).images[0]
        assert alone.tobytes() == each[index].tobytes()
        assert (alone.tobytes() == shared[index].tobytes()) == (negative == "le")


def test_seed_zero_and_the_largest_are_legal(pipeline: Pipeline) -> None:
    zero = pipeline("a", seed=0, num_inference_steps=1).images[0]
    assert zero.tobytes() == pipeline("a", seed=0, num_inference_steps=1).images[0].tobytes()
    assert pipeline("a", seed=2**64 - 1, num_inference_steps=1).seeds == [2**64 - 1]


def test_guidance_off_takes_one_row(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = Denoiser.run

    def record(self: Denoiser, jobs: Any) -> None:
        rows.append(sum(job.rows for job in jobs))
        original(self, jobs)

    monkeypatch.setattr(Denoiser, "run", record)
    pipeline("a", seed=0, num_inference_steps=2, guidance_scale=0)
    pipeline("a", seed=0, num_inference_steps=2, guidance_scale=1.5)
    assert rows == [1, 1, 2, 2]


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmpp-2m", "euler"])
def test_a_step_allocates_nothing_after_the_first(pipeline: Pipeline, scheduler: str) -> None:
    peaks = []

    def measure(_: StepEnd) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0])
        tracemalloc.reset_peak()

    pipeline("a", seed=0, num_inference_steps=3, scheduler=scheduler, height=64, width=64)
    tracemalloc.start()
    try:
        pipeline(
            "a", seed=0, num_inference_steps=12, scheduler=scheduler, height=64, width=64, callback_on_step_end=measure
        )
    finally:
        tracemalloc.stop()
    # One array of latents here is 16 KiB; what is left are Python's own small objects.
    assert max(peaks[2:]) < 4096


def test_a_callback_can_stop_the_run(pipeline: Pipeline) -> None:
    seen = []

    def stop(end: StepEnd) -> bool:
        seen.append((end.image, end.step, end.steps))
        return len(seen) < 4

    prompts = ["a", "apple " * 40]  # with as many tokens they would share the UNet's runs
    result = pipeline(prompts, seed=3, num_inference_steps=3, callback_on_step_end=stop)
    assert seen == [(0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 3)]
    assert result.seeds == [3]
    assert len(result.images) == 1


@pytest.mark.parametrize("chosen", [{"timesteps": [900, 500, 100]}, {"sigmas": [9.0, 2.0, 0.5, 0.0]}])
def test_timesteps_or_noise_levels_can_be_chosen(pipeline: Pipeline, chosen: dict[str, Any]) -> None:
    seen: list[StepEnd] = []
    result = pipeline("a", seed=0, scheduler="euler", callback_on_step_end=seen.append, **chosen)
    assert (result.pictures[0].settings.request.num_inference_steps, len(seen)) == (3, 3)


def test_output_types_and_timings(pipeline: Pipeline) -> None:
    latent = pipeline("a", seed=1, num_inference_steps=2, output_type="latent").images[0]
    assert latent.shape == (4, 16, 16)
    array = pipeline("a", seed=1, num_inference_steps=2, output_type="np").images[0]
    result = pipeline("", seed=1, num_inference_steps=2)
    assert array.shape == (32, 32, 3)
    assert result.images[0].size == (32, 32)
    assert len(result.timings.runs) == 2
    assert result.timings.total >= result.timings.denoising > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 33}, r"height=33 is not a positive multiple of 2; use 32"),
        ({"width": -8}, r"width=-8 .* use 2"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0 is outside 1\.\.1000"),
        ({"num_inference_steps": -3}, r"num_inference_steps=-3 is outside"),
        ({"guidance_scale": math.nan}, r"guidance_scale=nan is not a finite number"),
        ({"seed": -1}, r"seed=-1 is outside 0\.\.2\*\*64-1"),
        ({"seed": 2**64}, r"seed=18446744073709551616 is outside"),
        ({"scheduler": "ddim", "sigmas": [9.0, 2.0, 0.0]}, "ddim takes no list of sigmas; those that do: "),
        ({"scheduler": "magic"}, r"no scheduler 'magic'; valid: ddim, ddpm, "),
        ({"output_type": "gif"}, r"valid: pil, np, latent"),
        ({"num_images_per_prompt": 0}, r"less than 1"),
        ({"latents": np.zeros((1, 4, 3, 3), np.float32)}, r"\(1, 4, 16, 16\) is needed"),
        ({"negative_prompt": ["a", "b"]}, r"2 negative prompts for 1 prompts"),
    ],
)
def test_bad_input_gets_one_line(pipeline: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", **settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="valid: auto, tensorrt, tensorrt-rtx, cuda, cpu"):
        Pipeline.load(tiny_bundle, backend="vulkan")
