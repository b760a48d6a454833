"""What comes out is typed, says what it is, and goes into numpy and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
MASK = np.zeros((32, 32), np.bool_)
MASK[8:24, 8:24] = True


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, "cpu") as opened:
        yield opened


def test_a_picture_says_what_it_is_and_is_an_array(pipeline: Pipeline, tmp_path: Path) -> None:
    output = pipeline("red apple", seed=7, num_inference_steps=2, scheduler="euler")
    (picture,) = output.pictures
    assert repr(picture) == "<Picture 32x32 of 'red apple', seed 7, 2 steps of euler, tiny>"
    assert repr(output).startswith("<Output of 1 pictures in ")
    assert picture.seed == output.seeds[0] == 7
    assert np.asarray(picture).shape == (32, 32, 3)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(output.images[0]))
    path = picture.save(tmp_path / "a.png")
    assert str(picture.settings.parameters()) == read_parameters(path)
    assert picture.save(tmp_path / "a.png") == tmp_path / "a-1.png"
    assert picture.save(tmp_path / "a.png", overwrite=True) == tmp_path / "a.png"
    assert output.timings.to_json()["runs"] == list(output.timings.runs)
    latents = pipeline("a", num_inference_steps=1, output_type="latent").pictures[0]
    with pytest.raises(InputError, match="only images are saved"):
        latents.save(tmp_path / "b.png")


@pytest.mark.parametrize("kind", ["floats", "grey", "four channels"])
def test_arrays_are_pictures_to_start_from(pipeline: Pipeline, kind: str) -> None:
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 4, "strength": 0.5}
    arrays: dict[str, Any] = {
        "floats": (PIXELS / 255, Image.fromarray(PIXELS)),
        "grey": (PIXELS[:, :, :1], Image.fromarray(PIXELS[:, :, 0])),
        "four channels": (np.dstack([PIXELS, np.full((32, 32), 255, np.uint8)]), Image.fromarray(PIXELS)),
    }
    array, image = arrays[kind]
    drawn = [pipeline("red", image=source, **settings).images[0].tobytes() for source in (array, image)]
    assert drawn[0] == drawn[1]
    masked = [
        pipeline("red", image=image, mask_image=mask, **settings).images[0].tobytes()
        for mask in (MASK, Image.fromarray(MASK.astype(np.uint8) * 255))
    ]
    assert masked[0] == masked[1] != drawn[0]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 32, 32)), r"image is an array of the shape \(3, 32, 32\); give \(height, width, 3\)"),
        (np.full((8, 8, 3), 1.5), r"image is an array of floats that are not all in 0\.\.1"),
        (np.full((8, 8, 3), np.nan), r"image is an array of floats that are not all in 0\.\.1"),
        (np.zeros((8, 8, 3), np.int64), "image is an array of int64; give uint8"),
        (np.zeros((0, 8, 3), np.uint8), r"image is an array of the shape \(0, 8, 3\)"),
        (object(), "image is of type object, not a picture; give a PIL image, an array or a file's path"),
    ],
)
def test_arrays_that_are_no_pictures_get_one_line(array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(prompt="a", image=array)


@pytest.mark.parametrize(
    ("output", "where"),
    [
        ("hidden_states", "the text encoder"),
        ("noise_pred", "the denoising loop"),
        ("image", "the autoencoder's decoder"),
    ],
)
def test_what_is_not_finite_is_noticed_and_said_where_it_began(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, output: str, where: str
) -> None:
    original = OnnxRuntimeCpuSession.run

    def spoilt(self: OnnxRuntimeCpuSession, sizes: Any) -> None:
        original(self, sizes)
        if any(spec.name == output for spec in self.outputs):
            self.buffer(output, sizes).reshape(-1)[5] = np.nan

    monkeypatch.setattr(OnnxRuntimeCpuSession, "run", spoilt)
    with (
        Pipeline.load(tiny_bundle, "cpu") as opened,
        pytest.raises(BackendError, match=f"seed 3 has values that are not finite, from {where} on"),
    ):
        opened("red", seed=3, num_inference_steps=2)


def test_a_guidance_scale_beyond_all_bounds_is_an_error_and_not_a_black_picture(pipeline: Pipeline) -> None:
    with pytest.raises(BackendError, match="from the denoising loop on; use a smaller guidance"):
        pipeline("red", seed=3, num_inference_steps=3, guidance_scale=1e38)


def test_a_source_that_is_gone_by_then_costs_no_picture(pipeline: Pipeline, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.fromarray(PIXELS).save(source)
    picture = pipeline("red", image=source, seed=1, num_inference_steps=4).pictures[0]
    source.unlink()
    text = read_parameters(picture.save(tmp_path / "a.png"))
    assert "Image: source.png" in text
    assert "Image hash" not in text
