"""The autoencoder alone: whole, in tiles, tiny; against diffusers' own."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from calotype.export.bundle import export_checkpoint
from calotype.runtime.bundle.manifest import VaeSpec
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.picture import StepEnd
from calotype.runtime.pictures.autoencoder import Tiles, Vae
from calotype.runtime.pipeline import Pipeline

ROOT = Path(__file__).parents[3]
# Of the tiny checkpoint: diffusers takes sample_size / downscale, and a quarter of it.
TILES = Tiles(size=16, overlap=4)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        vae = diffusers.AutoencoderKL.from_pretrained(tiny_checkpoint, subfolder="vae", torch_dtype=torch.float16)
        return vae.float()  # the weights as the bundle stores them, computed in float32


@pytest.fixture(scope="module")
def tiny_vae(taesd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle with nothing but a tiny autoencoder, and diffusers' module with the same weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        bundle = tmp_path_factory.mktemp("bundles") / "taesd"
        export_checkpoint(taesd_checkpoint, bundle, precision="fp32")
        return bundle, diffusers.AutoencoderTiny.from_pretrained(taesd_checkpoint)


def to_unit(image: torch.Tensor) -> NDArray[Any]:
    unit: NDArray[Any] = (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return unit


def latents(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(8).standard_normal(shape, np.float32)


def test_decode_and_encode_equal_diffusers(tiny_bundle: Path, reference: Any) -> None:
    given = latents(4, 9, 20)
    with Vae.load(tiny_bundle) as vae, torch.no_grad():
        pixels = vae.decode(given)
        scaled = torch.from_numpy(given)[None] / reference.config.scaling_factor
        np.testing.assert_allclose(pixels, to_unit(reference.decode(scaled).sample), rtol=0, atol=1e-4)
        image = pixels.transpose(2, 0, 1) * 2 - 1
        posterior = reference.encode(torch.from_numpy(image)[None]).latent_dist
        mean, logvar = vae.encode(image)
        np.testing.assert_allclose(mean, posterior.mean[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(logvar, posterior.logvar[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 35), (47, 12), (29, 44)])
def test_tiles_equal_diffusers_but_for_the_corners(tiny_bundle: Path, reference: Any, shape: tuple[int, int]) -> None:
    given = latents(4, *shape)
    image = np.tanh(latents(3, 2 * shape[0], 2 * shape[1]))
    reference.enable_tiling()
    try:
        with Vae.load(tiny_bundle, tiles=TILES) as vae, torch.no_grad():
            scaled = torch.from_numpy(given)[None] / reference.config.scaling_factor
            pixels = to_unit(reference.decode(scaled).sample)
            posterior = reference.encode(torch.from_numpy(image)[None]).latent_dist
            got = vae.decode(given)
            mean, logvar = vae.encode(image)
    finally:
        reference.disable_tiling()
    assert got.shape == pixels.shape
    # Where four tiles meet, diffusers counts the first of them twice.
    for value, expected, factor in (
        (got, pixels, 2),
        (mean.transpose(1, 2, 0), posterior.mean[0].permute(1, 2, 0), 1),
        (logvar.transpose(1, 2, 0), posterior.logvar[0].permute(1, 2, 0), 1),
    ):
        corners = np.zeros(value.shape[:2], bool)
        for axis, length in enumerate(shape):
            shared = [index % 12 < 4 and index >= 12 for index in range(length)]
            along = np.repeat(shared, factor)
            corners = along[:, None] if axis == 0 else corners & along[None]
        assert corners.mean() < 0.2
        np.testing.assert_allclose(value[~corners], np.asarray(expected)[~corners], rtol=0, atol=1e-4)


def test_one_tile_is_the_whole_picture(tiny_bundle: Path) -> None:
    given = latents(4, 16, 11)
    with Vae.load(tiny_bundle, tiles=TILES) as tiled, Vae.load(tiny_bundle) as whole:
        np.testing.assert_array_equal(tiled.decode(given), whole.decode(given))


def test_no_seam_shows_in_a_real_picture() -> None:
    """The bundled model, on pictures that it drew: tiles of 16 latents are near the whole, and meet without a step."""
    with Image.open(ROOT / "docs" / "talbot.png") as file:
        picture = np.asarray(file.convert("RGB").crop((0, 0, 224, 224)), np.float32).transpose(2, 0, 1) / 127.5 - 1

    def drawn(tiles: Tiles | None) -> NDArray[Any]:
        with Vae.load("talbot", tiles=tiles) as vae:
            return vae.decode(latent)

    with Vae.load("talbot") as vae:
        latent, width = vae.encode(picture)[0] * vae.scale.factor, vae.spec.downscale
        whole = vae.decode(latent)
    borders = [width * start - 1 for start in range(12, latent.shape[1], 12)]
    faded, hard = drawn(Tiles(size=16, overlap=4)) - whole, drawn(Tiles(size=12, overlap=0)) - whole
    assert -10 * math.log10(float(np.mean(faded**2))) >= 25
    for axis in (0, 1):
        steps, hard_steps = (np.abs(np.diff(value, axis=axis)).mean(axis=(1 - axis, 2)) for value in (faded, hard))
        assert steps[borders].max() <= 3 * steps.mean()
        assert hard_steps[borders].min() >= 5 * steps.mean()  # what a seam would look like


def test_the_tiny_autoencoder_equals_diffusers(tiny_vae: tuple[Path, Any]) -> None:
    folder, reference = tiny_vae
    given = latents(4, 7, 10)
    with Vae.load(folder) as vae, torch.no_grad():
        pixels = vae.decode(given)
        np.testing.assert_allclose(pixels, to_unit(reference.decode(torch.from_numpy(given)[None]).sample), atol=1e-5)
        image = pixels.transpose(2, 0, 1) * 2 - 1
        mean, logvar = vae.encode(image)
        np.testing.assert_allclose(mean, reference.encode(torch.from_numpy(image)[None]).latents[0], atol=1e-4)
        assert np.all(logvar == -30)


def test_latents_of_another_kind_are_refused(tiny_bundle: Path) -> None:
    with Vae.load(tiny_bundle) as vae:
        vae.check_fits(VaeSpec(scaling_factor=1.0, downscale=2))
        with pytest.raises(InputError, match=r"has latents of 4 channels, 2 pixels .* makes 16 channels, 8 pixels"):
            vae.check_fits(VaeSpec(scaling_factor=1.0, latent_channels=16))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is of type NoneType; give a numpy array of floats"),
        ([[[1.0]]], "is of type list; give a numpy array of floats"),
        (np.zeros((4, 8, 8), np.int64), "is an array of int64; give a numpy array of floats"),
        (np.zeros((4, 8), np.float32), r"has the shape \(4, 8\); give \(\d, height, width\)"),
        (np.zeros((5, 8, 8), np.float32), r"has the shape \(5, 8, 8\); give \(\d, height, width\)"),
        (np.zeros((3, 8, 7), np.float32), r"has the shape \(3, 8, 7\); give \(\d, height, width\)"),
    ],
)
def test_what_is_no_latents_or_pixels_is_one_line(tiny_bundle: Path, value: Any, said: str) -> None:
    with Vae.load(tiny_bundle) as vae:
        with pytest.raises(InputError, match=f"latents {said}"):
            vae.decode(value)
        with pytest.raises(InputError, match=f"pixels {said}"):
            vae.encode(value)


@pytest.mark.parametrize(("size", "overlap"), [(8, 5), (0, 0), (-4, 1), (8, -1)])
def test_tiles_that_are_none(size: int, overlap: int) -> None:
    with pytest.raises(InputError, match=rf"tiles of size={size} .*; use"):
        Tiles(size=size, overlap=overlap)


def test_a_bundle_without_an_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        Vae.load(tmp_path / "nothing")


def test_a_pipeline_draws_with_another_autoencoder(tiny_bundle: Path, tiny_vae: tuple[Path, Any]) -> None:
    folder, reference = tiny_vae
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 2}
    previews = []
    with Pipeline.load(tiny_bundle, "cpu", vae=folder) as pipeline, Vae.load(folder, "cpu") as preview:

        def show(end: StepEnd) -> None:
            previews.append(preview.decode(end.latents))

        latent = pipeline("a", output_type="latent", callback_on_step_end=show, **settings).images[0]
        got = pipeline("a", output_type="np", **settings).images[0]
        again = pipeline("a", image=Image.new("RGB", (32, 32), "red"), strength=0, output_type="np", **settings)
    with torch.no_grad():
        expected = to_unit(reference.decode(torch.from_numpy(latent)[None]).sample)
        red = reference.encode(torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 32, 32)).latents
        np.testing.assert_allclose(again.images[0], to_unit(reference.decode(red).sample), atol=1e-4)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_array_equal(previews[-1], got)
    assert previews[0].shape == (32, 32, 3)


def test_an_autoencoder_that_does_not_say_its_scale_has_that_of_the_model(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "calotype.json").read_text())
    manifest["vae"]["scaling_factor"] = None
    del manifest["sha256"]
    (folder / "calotype.json").write_text(json.dumps(manifest))
    settings: dict[str, Any] = {"image": Image.linear_gradient("L").resize((48, 32)), "strength": 0.5, "seed": 0}
    settings |= {"num_inference_steps": 2, "output_type": "np"}
    with Pipeline.load(tiny_bundle, "cpu") as own, Pipeline.load(tiny_bundle, "cpu", vae=folder) as other:
        np.testing.assert_array_equal(other("a", **settings).images[0], own("a", **settings).images[0])
    with pytest.raises(InputError, match=r"vae does not say the scale of its latents; give scaling_factor: 0\.18215 "):
        Vae.load(folder, "cpu")
    given = latents(4, 6, 5)
    with Vae.load(folder, "cpu", scaling_factor=0.5) as told, Vae.load(tiny_bundle, "cpu") as vae:
        np.testing.assert_allclose(told.decode(given), vae.decode(given * (vae.scale.factor / 0.5)), rtol=0, atol=1e-5)


def test_a_pipeline_in_tiles(tiny_bundle: Path) -> None:
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "height": 48, "width": 70, "output_type": "np"}
    with Pipeline.load(tiny_bundle, "cpu", vae_tiles=TILES) as tiled, Vae.load(tiny_bundle, "cpu", TILES) as vae:
        latent = tiled("a", **{**settings, "output_type": "latent"}).images[0]
        np.testing.assert_array_equal(tiled("a", **settings).images[0], vae.decode(latent))


def test_another_autoencoder_that_does_not_fit_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(
        InputError, match=r"the autoencoder .*talbot has latents of .*; this model makes 4 channels, 2 pix"
    ):
        Pipeline.load(tiny_bundle, "cpu", vae="talbot")
