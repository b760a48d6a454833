"""Drawing into a part of a picture, against diffusers' own pipeline; what is outside comes back exactly."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.errors import InputError
from calotype.runtime.picture import StepEnd
from calotype.runtime.pictures.masks import latent_mask, paste
from calotype.runtime.pipeline import Pipeline
from tests.runtime.conftest import Model
from tests.runtime.references import diffusers_pipeline, draws, injected, psnr


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Any:
    with Pipeline.load(tiny_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def inpainting(sd2_inpainting: Model) -> Any:
    with Pipeline.load(sd2_inpainting.bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White from (8, 6) to (32, 24), which are whole latents of the tiny models."""
    image = Image.new("L", (48, 32))
    image.paste(255, (8, 6, 32, 24))
    return image


@pytest.mark.parametrize(
    "scheduler",
    [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")],
)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_four_channels_equal_diffusers_to_50_db_inside_the_mask(
    pipeline: Pipeline,
    tiny_checkpoint: Path,
    picture: Image.Image,
    mask: Image.Image,
    scheduler: tuple[str, str],
    strength: float,
) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 6, "strength": strength, "guidance_scale": 3.0}
    reference = diffusers_pipeline(tiny_checkpoint, "StableDiffusionInpaintPipeline", scheduler[1])
    noise, posterior, unused = draws(5, (4, 16, 24), 3)
    size = {"height": 32, "width": 48}
    with injected(reference, noise=noise, posteriors=[posterior, unused]):
        expected = reference("red apple", picture, mask, output_type="np", **size, **settings).images[0]
    got = pipeline(
        "red apple", image=picture, mask_image=mask, output_type="np", seed=5, scheduler=scheduler[0], **settings
    ).images[0]
    inside = np.asarray(mask) > 0
    assert got[inside].std() > 0.01
    assert psnr(got[inside], expected[inside]) >= 50


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_nine_channels_equal_diffusers_to_50_db_inside_the_mask(
    inpainting: Pipeline, sd2_inpainting: Model, picture: Image.Image, mask: Image.Image, strength: float
) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 6, "strength": strength, "guidance_scale": 3.0}
    reference = diffusers_pipeline(sd2_inpainting.checkpoint, "StableDiffusionInpaintPipeline")
    noise, first, second = draws(5, (4, 16, 24), 3)
    posteriors = [first] if strength == 1 else [first, second]
    with injected(reference, noise=noise, posteriors=posteriors):
        expected = reference(
            "red apple", picture, mask, output_type="np", height=32, width=48, negative_prompt="le", **settings
        ).images[0]
    got = inpainting(
        "red apple", image=picture, mask_image=mask, output_type="np", seed=5, negative_prompt="le", **settings
    ).images[0]
    inside = np.asarray(mask) > 0
    assert inpainting.manifest.family == "sd2"
    assert got[inside].std() > 0.01
    assert psnr(got[inside], expected[inside]) >= 50


@pytest.mark.parametrize("feather", [0, 5])
@pytest.mark.parametrize("kind", ["pipeline", "inpainting"])
def test_what_is_outside_the_mask_comes_back_exactly(
    request: pytest.FixtureRequest, kind: str, picture: Image.Image, feather: int
) -> None:
    ragged = Image.fromarray(np.random.default_rng(7).integers(0, 256, (32, 48), dtype=np.uint8))
    opened = request.getfixturevalue(kind)
    drawn = opened("a", image=picture, mask_image=ragged, feather=feather, seed=0, num_inference_steps=2).images[0]
    inside = np.asarray(ragged) >= 128
    different = (np.asarray(drawn) != np.asarray(picture)).any(axis=2)
    assert not different[~inside].any()
    assert different[inside].mean() > 0.9


def test_feathering_fades_inside_the_mask() -> None:
    mask = np.zeros((9, 20), bool)
    mask[:, 4:] = True
    picture = np.zeros((9, 20, 3), np.uint8)
    row = paste(np.ones((9, 20, 3), np.float32), picture, mask, 4)[4, :, 0]
    assert row.tolist() == [0, 0, 0, 0, 0.25, 0.5, 0.75, *[1] * 13]


def test_a_latent_is_drawn_where_any_of_its_pixels_is() -> None:
    mask = np.zeros((8, 8), bool)
    mask[3, 5] = True
    assert latent_mask(mask, 4).tolist() == [[False, True], [False, False]]


def test_an_image_depends_on_its_seed_alone(pipeline: Pipeline, picture: Image.Image, mask: Image.Image) -> None:
    settings: dict[str, Any] = {"image": picture, "mask_image": mask, "num_inference_steps": 3, "scheduler": "ddpm"}
    batch = pipeline(["le", "a"], seed=6, num_images_per_prompt=2, **settings).images
    assert pipeline("a", seed=8, **settings).images[0].tobytes() == batch[2].tobytes()


@pytest.mark.parametrize("kind", ["pipeline", "inpainting"])
def test_a_step_allocates_nothing_after_the_first(request: pytest.FixtureRequest, kind: str) -> None:
    opened, peaks = request.getfixturevalue(kind), []
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 32, 32))

    def measure(_: StepEnd) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0])
        tracemalloc.reset_peak()

    settings: dict[str, Any] = {"image": Image.new("RGB", (64, 64), "red"), "mask_image": mask, "scheduler": "ddim"}
    settings |= {"guidance_rescale": 0.5, "guidance_interval": (0.0, 50.0)}
    opened("a", num_inference_steps=3, **settings)
    tracemalloc.start()
    try:
        opened("a", num_inference_steps=12, callback_on_step_end=measure, **settings)
    finally:
        tracemalloc.stop()
    assert max(peaks[2:]) < 4096  # one array of latents here is 16 KiB


def test_masks_are_read_as_pictures_are_and_turned_with_them(
    pipeline: Pipeline, picture: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 2}
    picture.save(tmp_path / "picture.png")
    mask.convert("1").save(tmp_path / "mask.png")
    files = pipeline("a", image=tmp_path / "picture.png", mask_image=str(tmp_path / "mask.png"), **settings).images[0]
    assert files.tobytes() == pipeline("a", image=picture, mask_image=mask, **settings).images[0].tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_image": Image.new("L", (40, 32), 255)}, "the mask has 40x32 pixels and the picture 48x32; give a mask"),
        ({"mask_image": Image.new("L", (48, 32))}, "the mask is black all over; paint what is to be drawn white"),
        ({"image": None}, "mask_image is about a picture, and there is none; give image too"),
        ({"feather": -1}, r"feather=-1 is outside 0\.\.16384; use 0"),
        ({"feather": 1.5}, r"feather=1\.5 is not a whole number"),
    ],
)
def test_bad_input_gets_one_line(
    pipeline: Pipeline, picture: Image.Image, mask: Image.Image, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", **{"image": picture, "mask_image": mask, **settings})
    assert "\n" not in str(caught.value)


def test_an_inpainting_model_needs_a_picture_and_a_mask(inpainting: Pipeline, picture: Image.Image) -> None:
    for settings in ({}, {"image": picture}):
        with pytest.raises(InputError, match="is an inpainting model; give image and mask_image"):
            inpainting("a", **settings)
