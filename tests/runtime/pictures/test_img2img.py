"""A picture as the start, against diffusers' own pipeline, and the pictures that people have."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.errors import InputError
from calotype.runtime.picture import StepEnd
from calotype.runtime.pictures.reading import fit_image, load_image, to_rgb
from calotype.runtime.pipeline import Pipeline
from tests.runtime.pictures.samples import png
from tests.runtime.references import diffusers_pipeline, draws, injected, psnr


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Any:
    with Pipeline.load(tiny_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).resize((48, 32))


@pytest.mark.parametrize(
    ("scheduler", "class_name"),
    [
        ("ddim", "DDIMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("dpmpp-2m", "DPMSolverMultistepScheduler"),
        ("pndm", "PNDMScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("euler-a", "EulerAncestralDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_equals_diffusers_to_50_db(
    pipeline: Pipeline,
    tiny_checkpoint: Path,
    picture: Image.Image,
    scheduler: str,
    class_name: str,
    strength: float,
) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 8, "strength": strength, "guidance_scale": 3.0}
    config = {"skip_prk_steps": True} if scheduler == "pndm" else {}  # as Stable Diffusion 1.x has it
    reference = diffusers_pipeline(tiny_checkpoint, "StableDiffusionImg2ImgPipeline", class_name, **config)
    stochastic = int(8 * strength) if scheduler == "euler-a" else 0
    noise, posterior, *steps = draws(5, (4, 16, 24), 2 + stochastic)
    with injected(reference, noise=noise, posteriors=[posterior], steps=steps):
        expected = reference("red apple", picture, negative_prompt="le", output_type="np", **settings).images[0]
    settings |= {"scheduler": scheduler, "scheduler_config": config, "seed": 5}
    got = pipeline("red apple", image=picture, negative_prompt="le", output_type="np", **settings).images[0]
    assert got.std() > 0.01
    assert psnr(got, expected) >= 50


def test_strength_0_is_the_picture_through_the_autoencoder(
    pipeline: Pipeline, tiny_checkpoint: Path, picture: Image.Image
) -> None:
    import torch

    vae = diffusers_pipeline(tiny_checkpoint, "StableDiffusionImg2ImgPipeline").vae
    pixels = torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1)[None].copy()) / 127.5 - 1
    _, posterior = draws(5, (4, 16, 24), 2)
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
        decoded = vae.decode(distribution.mean + distribution.std * torch.from_numpy(posterior)).sample
    expected = (decoded[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)
    seen: list[StepEnd] = []
    result = pipeline(
        "a", image=picture, strength=0, seed=5, output_type="np", callback_on_step_end=lambda end: seen.append(end)
    )
    assert psnr(result.images[0], expected) >= 50
    assert seen == []
    assert result.timings.vae_encoder > 0


def test_strength_1_ignores_the_picture(pipeline: Pipeline, picture: Image.Image) -> None:
    for scheduler in ("ddim", "ddpm"):
        settings: dict[str, Any] = {"seed": 4, "num_inference_steps": 3, "scheduler": scheduler}
        drawn = pipeline("a", image=picture, strength=1, **settings).images[0]
        assert drawn.tobytes() == pipeline("a", width=48, height=32, **settings).images[0].tobytes()


def test_an_image_depends_on_its_seed_alone(pipeline: Pipeline, picture: Image.Image) -> None:
    settings: dict[str, Any] = {"image": picture, "num_inference_steps": 4, "scheduler": "ddpm", "strength": 0.5}
    batch = pipeline(["le", "a"], seed=6, num_images_per_prompt=2, **settings).images
    assert len({image.tobytes() for image in batch}) == 4
    assert pipeline("a", seed=8, **settings).images[0].tobytes() == batch[2].tobytes()


def test_steps_are_counted_from_where_it_starts(pipeline: Pipeline, picture: Image.Image) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(
        "a",
        image=picture,
        num_inference_steps=10,
        strength=0.35,
        callback_on_step_end=lambda end: seen.append((end.step, end.steps)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_size_is_the_pictures_own_rounded_down_or_what_is_asked_for(pipeline: Pipeline) -> None:
    odd = Image.new("RGB", (37, 23), "red")
    settings: dict[str, Any] = {"image": odd, "num_inference_steps": 2, "strength": 0.5}
    assert pipeline("a", **settings).images[0].size == (36, 22)
    assert pipeline("a", **settings, width=20).images[0].size == (20, 22)
    assert pipeline("a", **settings, width=16, height=24).images[0].size == (16, 24)
    dot = settings | {"image": Image.new("RGB", (1, 1), "red")}
    assert pipeline("a", **dot, width=16, height=24).images[0].size == (16, 24)


def test_pictures_cover_and_are_cropped_evenly() -> None:
    bands = Image.new("RGB", (40, 10), "red")
    bands.paste("lime", (10, 0, 30, 10))
    assert np.asarray(fit_image(bands, 20, 10)).tolist() == [[[0, 255, 0]] * 20] * 10
    assert fit_image(bands, 40, 10).tobytes() == bands.tobytes()


def pictures() -> dict[str, tuple[Image.Image, tuple[int, int, int]]]:
    """Pictures of one colour in every mode, and what they are in RGB."""
    red = Image.new("RGB", (8, 6), (200, 10, 10))
    see_through = Image.new("RGBA", (8, 6), (200, 10, 10, 0))
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    hole = palette.copy()
    hole.info["transparency"] = 1
    return {
        "1": (Image.new("1", (8, 6), 1), (255, 255, 255)),
        "L": (Image.new("L", (8, 6), 77), (77, 77, 77)),
        "LA": (Image.new("LA", (8, 6), (77, 0)), (255, 255, 255)),
        "P": (palette, (200, 10, 10)),
        "P with a hole": (hole, (255, 255, 255)),
        "RGB": (red, (200, 10, 10)),
        "RGBA": (see_through, (255, 255, 255)),
        "CMYK": (red.convert("CMYK"), (200, 10, 10)),
        "YCbCr": (red.convert("YCbCr"), (200, 10, 10)),
        "HSV": (red.convert("HSV"), (200, 10, 10)),
        "I;16": (Image.fromarray(np.full((6, 8), 0x8080, np.uint16)), (128, 128, 128)),
        "I": (Image.new("I", (8, 6), 0xFFFF), (255, 255, 255)),
    }


@pytest.mark.parametrize("mode", pictures())
def test_every_mode_is_read(mode: str) -> None:
    image, colour = pictures()[mode]
    got = to_rgb(image)
    assert (got.mode, got.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(got, np.int16) - colour).max() <= 4


@pytest.mark.parametrize(
    ("mode", "suffix"), [("P with a hole", ".png"), ("I;16", ".png"), ("CMYK", ".jpg"), ("1", ".gif")]
)
def test_every_mode_is_read_from_a_file(tmp_path: Path, mode: str, suffix: str) -> None:
    image, colour = pictures()[mode]
    path = tmp_path / f"a{suffix}"
    image.save(path)
    assert np.abs(np.asarray(load_image(path), np.int16) - colour).max() <= 4


def test_16_bits_a_channel_keep_their_brightness(tmp_path: Path) -> None:
    row = struct.pack(">B6H", 0, 0x8000, 0x4000, 0xFFFF, 0, 0, 0x2000)
    path = tmp_path / "deep.png"
    path.write_bytes(png(2, 1, depth=16, data=row))
    assert np.asarray(load_image(path)).tolist() == [[[128, 64, 255], [0, 0, 32]]]


def test_a_rotated_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6), "red")
    image.paste("blue", (0, 0, 4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.size == (6, 8)
    assert (upright.getpixel((0, 0)), upright.getpixel((0, 7))) == ((0, 0, 255), (255, 0, 0))


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(png(8, 8))
    for name, message in (
        ("a.png", "is not a picture that can be read"),
        ("cut.png", "is not a picture that can be read"),
        ("no.png", "does not exist"),
        (".", "is not a picture that can be read"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(InputError, match="floating-point pixels; save it with 8 or 16 bits"):
        to_rgb(Image.new("F", (8, 8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.2}, r"strength=1\.2 is outside 0\.\.1; use 1"),
        ({"strength": -0.1}, r"strength=-0\.1 is outside 0\.\.1; use 0"),
        ({"strength": float("nan")}, "strength=nan is not a finite number"),
        ({"strength": 0.1, "num_inference_steps": 5}, r"strength=0\.1 leaves no step of 5; use more of either"),
        ({"image": None, "strength": 0.5}, "strength is about a picture, and there is none; give image too"),
        ({"image": 3}, "image is of type int, not a picture; give a PIL image, an array or a file's path"),
        ({"feather": 3}, "feather is about a mask, and there is none; give mask_image too"),
        ({"width": 33}, "width=33 is not a positive multiple of 2; use 32"),
        (
            {"image": Image.new("RGB", (1, 1))},
            "the picture has 1x1 pixels, and this model draws 2x2 to 16384x16384; give",
        ),
        (
            {"image": Image.new("RGB", (1, 8))},
            "the picture has 1x8 pixels, and this model draws 2x2 to 16384x16384; give",
        ),
        (
            {"image": Image.new("L", (20000, 2))},
            "the picture has 20000x2 pixels, and this model draws 2x2 to 16384x163",
        ),
        (
            {"image": Image.new("RGB", (1, 1)), "width": 1, "height": 2},
            "width=1 is not a positive multiple of 2; use 2",
        ),
        ({"image": Image.new("F", (8, 8))}, "the picture has floating-point pixels"),
        ({"image": "no.png"}, "no.png does not exist"),
    ],
)
def test_bad_input_gets_one_line(
    pipeline: Pipeline, picture: Image.Image, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", **{"image": picture, **settings})
    assert "\n" not in str(caught.value)
