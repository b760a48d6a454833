"""Guidance: its formulas against diffusers, where it is on, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from tests.runtime.references import diffusers_pipeline, psnr


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Any:
    with Pipeline.load(tiny_bundle) as opened:
        yield opened


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_equals_diffusers(rescale: float) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    conditional, unconditional = np.random.default_rng(0).standard_normal((2, 1, 4, 16, 24), np.float32)
    guided = unconditional + 7.5 * (conditional - unconditional)
    expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), rescale).numpy()
    got = conditional[0].copy()
    Guidance(scale=7.5, rescale=rescale).apply(got, unconditional[0].copy())
    assert np.abs(got - expected[0]).max() < 1e-5


def test_rescaling_nothing_is_no_division_by_zero() -> None:
    flat = np.ones((4, 2, 2), np.float32)
    Guidance(scale=2, rescale=1).apply(flat, np.ones_like(flat))
    assert (flat == 1).all()


def test_rescale_in_the_pipeline_equals_diffusers_to_50_db(pipeline: Pipeline, tiny_checkpoint: Path) -> None:
    import torch

    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 6.0, "guidance_rescale": 0.7}
    settings |= {"height": 32, "width": 48, "negative_prompt": "le", "output_type": "np"}
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 24), np.float32)
    reference = diffusers_pipeline(tiny_checkpoint, "StableDiffusionPipeline")
    expected = reference("red apple", latents=torch.from_numpy(latents.copy()), **settings).images[0]
    assert psnr(pipeline("red apple", latents=latents, **settings).images[0], expected) >= 50


@pytest.mark.parametrize(
    ("scale", "interval", "sigma", "active"),
    [
        (2.0, None, 14.0, True),
        (1.0, None, 14.0, False),
        (0.0, None, 1.0, False),
        (2.0, (0.3, 5.0), 5.0, True),
        (2.0, (0.3, 5.0), 5.01, False),
        (2.0, (0.3, 5.0), 0.3, False),
        (2.0, (0.3, 5.0), 0.31, True),
        (2.0, (0.3, 5.0), math.inf, False),
        (1.0, (0.3, 5.0), 1.0, False),
    ],
)
def test_where_it_is_on(scale: float, interval: Any, sigma: float, active: bool) -> None:
    assert Guidance(scale=scale, interval=interval).active(sigma) is active


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each run of the UNet."""
    seen: list[int] = []
    original = Denoiser.run

    def record(self: Denoiser, jobs: Any) -> None:
        seen.append(sum(job.rows for job in jobs))
        original(self, jobs)

    monkeypatch.setattr(Denoiser, "run", record)
    return seen


def test_outside_its_interval_a_step_costs_one_row(pipeline: Pipeline, rows: list[int]) -> None:
    pipeline("a", seed=0, num_inference_steps=10, guidance_interval=(0.5, 3.0))
    ones, twos, rest = rows.index(2), rows.count(2), rows[rows.index(2) + rows.count(2) :]
    assert rows == [1] * ones + [2] * twos + [1] * len(rest)
    assert min(ones, twos, len(rest)) >= 2


def test_an_interval_is_guidance_at_some_steps_and_none_at_others(pipeline: Pipeline) -> None:
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 6, "output_type": "latent"}
    everywhere = pipeline("red", guidance_interval=(0, 1000), **settings).images[0]
    assert everywhere.tobytes() == pipeline("red", **settings).images[0].tobytes()
    nowhere = pipeline("red", guidance_interval=(900, 1000), **settings).images[0]
    assert nowhere.tobytes() == pipeline("red", guidance_scale=1, **settings).images[0].tobytes()
    between = pipeline("red", guidance_interval=(0.5, 3), **settings).images[0]
    assert (between != everywhere).any()
    assert (between != nowhere).any()


def test_each_image_has_its_own_scale(pipeline: Pipeline, rows: list[int]) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 2}
    mixed = pipeline("red", seed=3, num_images_per_prompt=3, guidance_scale=[1, 4, 0], **settings).images
    assert rows == [4, 4]  # a row of the first and of the last image, two of the second
    for index, scale in enumerate((1, 4, 0)):
        alone = pipeline("red", seed=3 + index, guidance_scale=scale, **settings).images[0]
        assert alone.tobytes() == mixed[index].tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": [1, 2]}, r"2 guidance scales for 1 image\(s\); give one, or one for each image"),
        ({"guidance_scale": [math.inf]}, "guidance_scale=inf is not a finite number"),
        ({"guidance_scale": "7"}, "guidance_scale='7' is not a finite number"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale=1\.5 is outside 0\.\.1; use 1"),
        ({"guidance_interval": 3}, "guidance_interval=3 is not a pair of noise levels; use 0 <= low < high"),
        ({"guidance_interval": (5, 1)}, r"guidance_interval=\(5\.0, 1\.0\) is no range of noise levels"),
        ({"guidance_interval": (math.nan, 1)}, "guidance_interval=nan is not a finite number"),
    ],
)
def test_bad_input_gets_one_line(pipeline: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", **settings)
    assert "\n" not in str(caught.value)
