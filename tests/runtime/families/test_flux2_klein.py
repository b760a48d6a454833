"""FLUX.2 klein's pictures against diffusers' own pipelines, on the same weights and latents."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.bundle.manifest import Defaults, Manifest
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.families.flux2_klein import FLUX2_KLEIN, empirical_mu
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pictures.references import fit_reference
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.recall import recall
from calotype.runtime.request import Request
from tests.klein import READ
from tests.runtime.references import diffusers_pipeline, draws, injected, psnr

DECIBELS = 50.0
CHANNELS = 16
FACTOR = 4  # pixels that a latent spans
SMALL = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipeline(klein_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(klein_bundle, "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def base(klein_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """The same weights as those of a model that was not distilled."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(klein_bundle, folder)
    manifest = Manifest.read(folder)
    defaults = Defaults(height=32, width=32, num_inference_steps=6, guidance_scale=4.0)
    changed = dataclasses.replace(manifest, distilled=False, defaults=defaults)
    (folder / "calotype.json").write_text(changed.dumps(), encoding="utf-8")
    with Pipeline.load(folder, "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(klein_checkpoint: Path) -> Any:
    """Diffusers' pipeline, on the weights as the bundle stores them."""
    return diffusers_pipeline(klein_checkpoint, "Flux2KleinPipeline")


def noise(height: int, width: int, count: int = 1, seed: int = 0) -> np.ndarray:
    shape = (count, CHANNELS, height // FACTOR, width // FACTOR)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def drawn(theirs: Any, latents: np.ndarray, prompt: str, *, distilled: bool = True, **call: Any) -> np.ndarray:
    """Diffusers' picture, (H, W, 3) in 0..1."""
    import torch

    theirs.register_to_config(is_distilled=distilled)
    _, _, height, width = latents.shape
    call = {"height": height * FACTOR, "width": width * FACTOR, "guidance_scale": 1.0, **call}
    given = torch.from_numpy(latents.copy())
    options = {"output_type": "np", "text_encoder_out_layers": READ}
    image: np.ndarray = theirs(prompt=prompt, latents=given, **options, **call).images[0]
    return image


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 48), (44, 12)])
@pytest.mark.parametrize("steps", [1, 4])
def test_equals_diffusers_to_50_db(pipeline: Pipeline, theirs: Any, height: int, width: int, steps: int) -> None:
    latents, prompt = noise(height, width), "a red apple on a wooden table"
    size = {"height": height, "width": width, "num_inference_steps": steps}
    got = pipeline(prompt, latents=latents, output_type="np", **size).images[0]
    assert psnr(got, drawn(theirs, latents, prompt, **size)) >= DECIBELS


def test_the_prompt_steers(pipeline: Pipeline) -> None:
    latents = noise(32, 32)
    one, other = (
        pipeline(prompt, latents=latents, output_type="np", **SMALL).images[0]
        for prompt in ("a red apple", "a lighthouse")
    )
    assert psnr(one, other) < DECIBELS


def test_guidance_equals_diffusers_to_50_db(base: Pipeline, theirs: Any) -> None:
    latents, prompt = noise(24, 40), "a fox"
    size = {"height": 24, "width": 40, "num_inference_steps": 5}
    got = base(prompt, latents=latents, guidance_scale=4.0, output_type="np", **size).images[0]
    wanted = drawn(theirs, latents, prompt, distilled=False, guidance_scale=4.0, num_inference_steps=5)
    assert psnr(got, wanted) >= DECIBELS
    without = base(prompt, latents=latents, guidance_scale=1.0, output_type="np", **size).images[0]
    assert psnr(got, without) < DECIBELS
    steered = base(prompt, negative_prompt="dog", latents=latents, guidance_scale=4.0, output_type="np", **size)
    assert psnr(got, steered.images[0]) < DECIBELS


def test_a_distilled_model_takes_no_guidance(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    latents = noise(32, 32)
    plain = pipeline("a kite", latents=latents, output_type="np", **SMALL).images[0]
    with caplog.at_level(logging.WARNING):
        guided = pipeline("a kite", latents=latents, guidance_scale=4.0, output_type="np", **SMALL).images[0]
    assert "was distilled to draw without guidance, so guidance_scale is ignored" in caplog.text
    np.testing.assert_array_equal(plain, guided)


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_any_batch_gives_the_bytes_that_each_has_alone(base: Pipeline, scheduler: str) -> None:
    requests = [
        Request(prompt="a red apple", seed=1, height=32, width=32, num_inference_steps=3),
        Request(prompt="dog", seed=2, height=32, width=32, num_inference_steps=4, guidance_scale=1.0),
        Request(prompt="dog", seed=3, height=16, width=24, num_inference_steps=2, scheduler=scheduler),
    ]
    together = dict(base.draw(requests))
    for number, request in enumerate(requests):
        alone = next(iter(base.draw([request])))[1]
        assert together[number].image.tobytes() == alone.image.tobytes()


def test_chosen_noise_levels_equal_diffusers(pipeline: Pipeline, theirs: Any) -> None:
    latents, sigmas = noise(32, 32), [1.0, 0.6, 0.3]
    got = pipeline("a boat", latents=latents, sigmas=[*sigmas, 0.0], height=32, width=32, output_type="np").images[0]
    wanted = drawn(theirs, latents, "a boat", sigmas=sigmas, num_inference_steps=3)
    assert psnr(got, wanted) >= DECIBELS


@pytest.mark.parametrize("tokens", [1, 256, 1024, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_shift_is_that_of_diffusers(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 30}, "height=30 is not a positive multiple of 4; use 32"),
        ({"clip_skip": 1}, "clip_skip=1 is about CLIP, and this model has none; leave it out"),
        ({"original_size": (32, 32)}, "original_size is for SDXL models; klein is flux2-klein"),
        (
            {"scheduler": "ddim"},
            "ddim is no scheduler for a model that is trained by flow matching; valid: euler, heun",
        ),
        ({"prompt": "apple " * 600}, r"the prompt has \d+ tokens, and this model reads \d+; shorten it by a good part"),
    ],
)
def test_what_it_cannot_do_is_one_line(pipeline: Pipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(**{"prompt": "a red apple", "height": 32, "width": 32, **call})


def test_weights_in_a_prompt_are_words(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline("a (red:1.3) apple", height=16, width=16, num_inference_steps=1)
    assert "reads a prompt as it stands, so '(red:1.3)' is words, and no weight" in caplog.text


def test_a_seed_is_a_picture(pipeline: Pipeline) -> None:
    size = {"height": 16, "width": 24, "num_inference_steps": 2}
    seeded = pipeline("a tree", seed=7, **size).images[0]
    latents = np.stack(draws(7, (CHANNELS, 4, 6), 1))
    assert seeded.tobytes() == pipeline("a tree", latents=latents, **size).images[0].tobytes()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse noise, which an autoencoder keeps something of."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("sizes", [((64, 72),), ((64, 64), (70, 100))])
def test_an_edit_equals_diffusers_to_50_db(pipeline: Pipeline, theirs: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    latents, references = noise(24, 32), [picture(*size, number) for number, size in enumerate(sizes)]
    size = {"height": 24, "width": 32, "num_inference_steps": 3}
    got = pipeline("make it red", references=references, latents=latents, output_type="np", **size).images[0]
    wanted = drawn(theirs, latents, "make it red", image=references, num_inference_steps=3)
    assert psnr(got, wanted) >= DECIBELS
    without = pipeline("make it red", latents=latents, output_type="np", **size).images[0]
    assert psnr(got, without) < DECIBELS
    if len(references) > 1:
        turned = pipeline("make it red", references=references[::-1], latents=latents, output_type="np", **size)
        assert psnr(got, turned.images[0]) < DECIBELS


def test_an_edit_with_guidance_equals_diffusers(base: Pipeline, theirs: Any) -> None:
    latents, references = noise(16, 20), [picture(64, 64)]
    size = {"height": 16, "width": 20, "num_inference_steps": 3}
    options = {"guidance_scale": 3.0, "output_type": "np"}
    got = base("a hat", references=references, latents=latents, **options, **size).images[0]
    wanted = drawn(
        theirs, latents, "a hat", image=references, distilled=False, guidance_scale=3.0, num_inference_steps=3
    )
    assert psnr(got, wanted) >= DECIBELS


def test_the_size_of_an_edit_is_that_of_the_first_picture(pipeline: Pipeline) -> None:
    found = pipeline("a hat", references=[picture(67, 90), picture(40, 40)], num_inference_steps=1, seed=0).images[0]
    assert found.size == (88, 64)
    found = pipeline("a hat", references=[picture(67, 90)], height=32, num_inference_steps=1, seed=0).images[0]
    assert found.size == (88, 32)


def test_a_large_reference_is_shrunk_as_in_diffusers() -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    large = picture(1100, 1500)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    shrunk = processor._resize_to_target_area(large, 1024 * 1024)
    width, height = (side // 16 * 16 for side in shrunk.size)
    wanted = processor.preprocess(shrunk, height=height, width=width, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(fit_reference(large, 16) / 127.5 - 1, wanted, atol=1e-6)


def test_edits_share_runs_with_their_like_and_keep_their_bytes(base: Pipeline) -> None:
    size: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 3}
    requests = [
        Request(prompt="a hat", seed=1, references=(picture(24, 24, 1),), **size),
        Request(prompt="a red hat", seed=2, references=(picture(24, 24, 2),), **size),
        Request(prompt="a hat", seed=3, references=(picture(12, 48, 3),), **size),
        Request(prompt="a hat", seed=4, references=(picture(24, 32, 4),), **size),
        Request(prompt="a hat", seed=5, **size),
    ]
    jobs = [base.prepare(request) for request in requests]
    assert jobs[0].key == jobs[1].key == jobs[2].key  # as many tokens, whose places are rows
    assert len({job.key for job in jobs}) == 3
    while not all(job.done for job in jobs):
        base.step(jobs)
    together = [base.finish(job).image.tobytes() for job in jobs]
    assert len(set(together)) == len(requests)
    for request, found in zip(requests, together, strict=True):
        assert next(iter(base.draw([request])))[1].image.tobytes() == found


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_inpainting_equals_diffusers_inside_the_mask(
    pipeline: Pipeline, klein_checkpoint: Path, strength: float
) -> None:
    """Theirs shows the picture to the transformer, too, as a reference."""
    reference = diffusers_pipeline(klein_checkpoint, "Flux2KleinInpaintPipeline")
    start, mask = picture(48, 64), np.zeros((48, 64), np.uint8)
    mask[16:40, 24:52] = 255
    seed, shape = 3, (CHANNELS, 12, 16)
    pictures = {"image": start, "mask_image": Image.fromarray(mask), "references": [start]}
    got = pipeline("a bird", **pictures, strength=strength, seed=seed, output_type="np").images[0]
    with injected(reference, noise=draws(seed, shape, 1)[0]):
        wanted = reference(
            prompt="a bird",
            image=start,
            mask_image=Image.fromarray(mask),
            strength=strength,
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="np",
            text_encoder_out_layers=READ,
        ).images[0]
    inside = mask > 0
    assert psnr(got[inside], wanted[inside]) >= DECIBELS
    np.testing.assert_allclose(got[~inside], np.asarray(start)[~inside] / 255, atol=1e-6)


def test_a_transformer_that_reads_no_prompt_is_refused(pipeline: Pipeline) -> None:
    manifest = pipeline.manifest
    transformer = manifest.networks["transformer"]
    for inputs in (
        tuple(own for own in transformer.inputs if own.name != "encoder_hidden_states"),
        tuple(
            dataclasses.replace(own, shape=own.shape[:2]) if own.name == "encoder_hidden_states" else own
            for own in transformer.inputs
        ),
    ):
        networks = {**manifest.networks, "transformer": dataclasses.replace(transformer, inputs=inputs)}
        with pytest.raises(BundleError, match="takes no encoder_hidden_states"):
            FLUX2_KLEIN.check(dataclasses.replace(manifest, networks=networks))
    FLUX2_KLEIN.check(manifest)


def test_an_image_to_start_from_equals_diffusers(pipeline: Pipeline, klein_checkpoint: Path) -> None:
    """With a mask that is white all over, its inpainting is image to image, with the picture as a reference."""
    reference = diffusers_pipeline(klein_checkpoint, "Flux2KleinInpaintPipeline")
    start, seed = picture(32, 48, 5), 4
    options = {"strength": 0.6, "seed": seed, "num_inference_steps": 5, "output_type": "np"}
    got = pipeline("a bird", image=start, references=[start], **options).images[0]
    with injected(reference, noise=draws(seed, (CHANNELS, 8, 12), 1)[0]):
        wanted = reference(
            prompt="a bird",
            image=start,
            mask_image=Image.new("L", start.size, 255),
            strength=0.6,
            num_inference_steps=5,
            guidance_scale=1.0,
            output_type="np",
            text_encoder_out_layers=READ,
        ).images[0]
    assert psnr(got, wanted) >= DECIBELS


def test_an_edit_is_drawn_again_from_its_file(pipeline: Pipeline, klein_bundle: Path, tmp_path: Path) -> None:
    picture(24, 32).save(tmp_path / "hat.png")
    size = {"height": 16, "width": 16, "num_inference_steps": 2}
    first = pipeline("a hat", references=[tmp_path / "hat.png"], seed=1, **size).pictures[0]
    path = first.save(tmp_path / "drawn.png")
    found = recall(read_parameters(path), [tmp_path, klein_bundle])
    assert found.request.references == (tmp_path / "hat.png",)
    again = next(iter(pipeline.draw([found.request])))[1]
    assert again.image.tobytes() == first.image.tobytes()
    unnamed = pipeline("a hat", references=[picture(24, 32)], seed=1, **size).pictures[0].save(tmp_path / "other.png")
    with pytest.raises(InputError, match="a reference picture was no file, and cannot be found again"):
        recall(read_parameters(unnamed), [tmp_path, klein_bundle])


def test_an_edit_goes_through_json() -> None:
    request = Request(prompt="a hat", references=(picture(24, 32),))
    again = Request.from_json(request.to_json())
    assert np.array_equal(np.asarray(again.references[0]), np.asarray(request.references[0]))
    with pytest.raises(InputError, match="names a file, and files of a request are not opened here"):
        Request.from_json({"prompt": "a hat", "references": [{"file": "hat.png"}]})
    with pytest.raises(InputError, match="references is no list"):
        Request.from_json({"prompt": "a hat", "references": {"png": ""}})


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (
            [Image.new("RGB", (3, 40))],
            "the reference picture has 3x40 pixels; valid: 4 or more each way, and at most 8",
        ),
        ([Image.new("RGB", (8, 72))], "the reference picture has 8x72 pixels"),
        ([Image.new("RGB", (8, 8))] * 11, "11 references are more than the 10 that one picture takes; use fewer"),
        (Image.new("RGB", (8, 8)), "is no list of pictures; give a list, of one picture too"),
        ([3], r"references\[0\] is of type int, not a picture"),
        ([Path("nothing.png")], "nothing.png"),
    ],
)
def test_references_that_cannot_be_shown_are_one_line(pipeline: Pipeline, references: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline("a hat", references=references, height=16, width=16)


def test_a_model_that_does_not_edit_says_so(tiny_bundle: Path) -> None:
    with (
        Pipeline.load(tiny_bundle, "cpu") as opened,
        pytest.raises(InputError, match="tiny takes no reference pictures, as models that edit do; leave references"),
    ):
        opened("a hat", references=[picture(32, 32)], height=32, width=32)
