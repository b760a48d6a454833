"""Accelerated mode: deep-feature caching against diffusers with hooks on its UNet, and what it must not change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import CACHING
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.denoising.feature_cache import DEEP, SHALLOW, FeatureCache
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.picture import Output, StepEnd
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pipeline import Pipeline
from tests.runtime.command_line import calotype
from tests.runtime.conftest import Model
from tests.runtime.references import diffusers_pipeline, psnr

SETTINGS: dict[str, Any] = {"seed": 3, "num_inference_steps": 6, "output_type": "np"}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Any:
    with Pipeline.load(tiny_bundle) as opened:
        yield opened


@contextlib.contextmanager
def deep_cache(unet: Any, interval: int) -> Iterator[None]:
    """Ma et al. 2023 on diffusers' UNet: its last layer is given what came up from below at the last whole step."""
    kept: dict[str, Any] = {"calls": 0}

    def hook(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        import torch

        joined, *rest = arguments
        channels = joined.shape[1] - unet.config.block_out_channels[0]
        if kept["calls"] % interval == 0:
            kept["feature"] = joined[:, :channels]
        kept["calls"] += 1
        return torch.cat([kept["feature"], joined[:, channels:]], dim=1), *rest

    handle = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_equals_the_published_method_on_diffusers_to_50_db(
    family: str, interval: int, pipeline: Pipeline, tiny_checkpoint: Path, sdxl: Model
) -> None:
    import torch

    checkpoint = tiny_checkpoint if family == "sd1" else sdxl.checkpoint
    class_name = "StableDiffusionPipeline" if family == "sd1" else "StableDiffusionXLPipeline"
    settings: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 5.0, "height": 32, "width": 48}
    settings |= {"negative_prompt": "le", "output_type": "np"}
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 24), np.float32)
    reference = diffusers_pipeline(checkpoint, class_name)
    with deep_cache(reference.unet, interval):
        expected = reference("red apple", latents=torch.from_numpy(latents.copy()), **settings).images[0]
    with contextlib.nullcontext(pipeline) if family == "sd1" else Pipeline.load(sdxl.bundle) as opened:
        got = opened("red apple", latents=latents, fast=Acceleration(cache_interval=interval), **settings).images[0]
        exact = opened("red apple", latents=latents, **settings).images[0]
    assert psnr(got, expected) >= 50 > psnr(got, exact)


def test_an_interval_of_one_is_exact(pipeline: Pipeline) -> None:
    exact = pipeline("red", **SETTINGS).images[0].tobytes()
    assert pipeline("red", fast=Acceleration(cache_interval=1), **SETTINGS).images[0].tobytes() == exact
    assert pipeline("red", fast=False, **SETTINGS).images[0].tobytes() == exact


def test_true_is_the_preset_which_takes_fewer_steps_where_a_call_does_not_say_how_many(pipeline: Pipeline) -> None:
    own = pipeline.manifest.defaults.num_inference_steps
    settings = {name: value for name, value in SETTINGS.items() if name != "num_inference_steps"}
    fast = pipeline("red", fast=True, **settings)
    assert steps_of(fast) == round(own * 0.6)
    by_number = pipeline("red", num_inference_steps=steps_of(fast), **settings)
    assert fast.images[0].tobytes() == by_number.images[0].tobytes()
    assert steps_of(pipeline("red", fast=FAST, **SETTINGS)) == SETTINGS["num_inference_steps"]
    assert steps_of(pipeline("red", fast=Acceleration(steps=1e-3), **settings)) == 1


def steps_of(output: Output) -> int | None:
    return output.pictures[0].settings.request.num_inference_steps


def test_an_interval_longer_than_the_run_has_one_whole_step(pipeline: Pipeline) -> None:
    once = pipeline("red", fast=Acceleration(cache_interval=6), **SETTINGS).images[0]
    assert once.tobytes() == pipeline("red", fast=Acceleration(cache_interval=1000), **SETTINGS).images[0].tobytes()
    single = SETTINGS | {"num_inference_steps": 1}
    alone = pipeline("red", fast=Acceleration(cache_interval=1000), **single).images[0]
    assert alone.tobytes() == pipeline("red", **single).images[0].tobytes()


def test_an_image_depends_on_its_seed_alone(pipeline: Pipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 5, "scheduler": "ddpm", "fast": Acceleration(cache_interval=2)}
    alone = pipeline("red apple", seed=7, **settings).images[0].tobytes()
    batch = pipeline("red apple", seed=5, num_images_per_prompt=3, guidance_scale=[1, 3, 7.5], **settings)
    assert batch.images[2].tobytes() == alone
    mixed = pipeline(["le", "red apple"], seed=6, **settings)
    assert mixed.images[1].tobytes() == alone


def test_where_guidance_sets_in_the_whole_unet_is_evaluated() -> None:
    rng = np.random.default_rng(0)
    cache = FeatureCache(3, (2, 5, 4, 4))
    assert cache.network(1) == DEEP
    one, two, out = (rng.standard_normal((rows, 5, 4, 4), np.float32) for rows in (1, 2, 1))
    cache.keep(one)
    cache.grow_old()
    assert cache.network(1) == SHALLOW
    assert cache.network(2) == DEEP
    cache.keep(two)
    cache.grow_old()
    for _ in range(2):
        assert cache.network(2) == SHALLOW
        cache.give(out)
        np.testing.assert_array_equal(out, two[:1])
        cache.grow_old()
    assert cache.network(1) == DEEP


def test_works_beside_a_guidance_interval_and_a_call_s_own_comes_first(pipeline: Pipeline) -> None:
    preset = Acceleration(cache_interval=2, guidance_interval=(0.5, 3))
    drawn = pipeline("red", fast=preset, **SETTINGS).images[0].tobytes()
    caching = dataclasses.replace(preset, guidance_interval=None)
    assert pipeline("red", fast=caching, guidance_interval=(0.5, 3), **SETTINGS).images[0].tobytes() == drawn
    everywhere = pipeline("red", fast=preset, guidance_interval=(0, 1e9), **SETTINGS).images[0].tobytes()
    assert everywhere == pipeline("red", fast=caching, **SETTINGS).images[0].tobytes() != drawn


def test_a_pipeline_opens_the_graphs_it_needs(tiny_bundle: Path) -> None:
    fast, exact = Acceleration(cache_interval=2), {"text_encoder", "unet"}
    with Pipeline.load(tiny_bundle, fast=fast) as pipeline, Pipeline.load(tiny_bundle) as other:
        assert set(pipeline.engines) == {"text_encoder", *CACHING}
        drawn = pipeline("red", **SETTINGS).images[0].tobytes()
        assert set(other.engines) == exact
        assert other("red", fast=fast, **SETTINGS).images[0].tobytes() == drawn
        assert set(other.engines) == exact | set(CACHING)
        assert (
            pipeline("red", fast=EXACT, **SETTINGS).images[0].tobytes() == other("red", **SETTINGS).images[0].tobytes()
        )
    with Pipeline.load(tiny_bundle, low_memory=True, fast=fast) as pipeline:
        assert pipeline("red", **SETTINGS).images[0].tobytes() == drawn


def test_loras_are_merged_into_every_graph_of_the_unet(tiny_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # One of the deep part, and one of the shallow part.
    shapes = {"mid_block_resnets_0_conv1": (64, 64, 3, 3), "conv_out": (4, 32, 3, 3)}
    state = {}
    for name, (rows, *columns) in shapes.items():
        state[f"lora_unet_{name}.lora_down.weight"] = rng.standard_normal((2, *columns), np.float32)
        state[f"lora_unet_{name}.lora_up.weight"] = rng.standard_normal((rows, 2, 1, 1), np.float32)
    save_file(state, tmp_path / "a.safetensors")
    lora, fast = Lora(path=tmp_path / "a.safetensors", scale=0.1), Acceleration(cache_interval=6)
    with Pipeline.load(tiny_bundle, fast=fast) as pipeline, Pipeline.load(tiny_bundle, loras=[lora]) as merged:
        before = pipeline("red", **SETTINGS).images[0].tobytes()
        pipeline.set_loras([lora])
        after = pipeline("red", **SETTINGS).images[0].tobytes()
        assert merged("red", fast=fast, **SETTINGS).images[0].tobytes() == after != before
        pipeline.set_loras([])
        assert pipeline("red", **SETTINGS).images[0].tobytes() == before


def test_a_step_allocates_nothing_after_a_run(pipeline: Pipeline) -> None:
    peaks = []

    def measure(_: StepEnd) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0])
        tracemalloc.reset_peak()

    settings: dict[str, Any] = {"seed": 0, "fast": Acceleration(cache_interval=2), "height": 64, "width": 64}
    pipeline("a", num_inference_steps=3, **settings)
    tracemalloc.start()
    try:
        pipeline("a", num_inference_steps=12, callback_on_step_end=measure, **settings)
    finally:
        tracemalloc.stop()
    # A deep feature here is 128 KiB a row, an array of latents 16.
    assert max(peaks[2:]) < 4096


def test_an_old_bundle_draws_exactly_and_says_what_it_lacks(tiny_bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)
    manifest = json.loads((old / "calotype.json").read_text())
    for network in CACHING:
        for graph in manifest["networks"].pop(network)["graphs"].values():
            del manifest["files"][graph]
            (old / graph).unlink()
    del manifest["sha256"]
    (old / "calotype.json").write_text(json.dumps(manifest))
    message = "has no unet_deep, unet_shallow, which deep-feature caching takes; export the bundle again"
    with Pipeline.load(old) as pipeline, Pipeline.load(tiny_bundle) as new:
        assert pipeline("red", **SETTINGS).images[0].tobytes() == new("red", **SETTINGS).images[0].tobytes()
        pipeline("red", fast=Acceleration(guidance_interval=(0.5, 3)), **SETTINGS)
        with pytest.raises(BundleError, match=message):
            pipeline("red", fast=Acceleration(cache_interval=2), **SETTINGS)
    with pytest.raises(BundleError, match=message):
        Pipeline(Bundle.open(old), "cpu", fast=Acceleration(cache_interval=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 is no share of a model's steps; use more than 0, up to 1"),
        ({"steps": 1.5}, r"steps=1\.5 is no share"),
        ({"steps": math.nan}, "steps=nan is not a finite number"),
        ({"cache_interval": 0}, "cache_interval=0 is less than 1; use 1 or more"),
        ({"cache_interval": 1.5}, r"cache_interval=1\.5 is not a whole number"),
        ({"cache_interval": True}, "cache_interval=True is not a whole number"),
        ({"guidance_interval": (3, 1)}, r"guidance_interval=\(3\.0, 1\.0\) is no range of noise levels"),
        ({"guidance_interval": math.nan}, "guidance_interval=nan is not a pair of noise levels"),
    ],
)
def test_bad_settings_get_one_line(pipeline: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", fast=Acceleration(**settings), **SETTINGS)
    assert "\n" not in str(caught.value)


def test_what_is_no_acceleration_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="fast=3 is not known; use True, False or an Acceleration"):
        pipeline("a", fast=3, **SETTINGS)  # type: ignore[arg-type]


def test_the_command_line_draws_it_and_writes_it_down(pipeline: Pipeline, tiny_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    own = pipeline.manifest.defaults.num_inference_steps
    result = calotype(
        "generate", "red", "-m", str(tiny_bundle), "--seed", "3", "-o", "fast.png", "--fast", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert f"Steps: {round(own * 0.6)}," in read_parameters(tmp_path / "fast.png")
    common = ("red", "-m", str(tiny_bundle), "--seed", "3", "--steps", "6")
    for name, options, acceleration in (
        ("own", ("--cache-interval", "3"), Acceleration(cache_interval=3)),
        ("both", ("--fast", "--cache-interval", "4"), dataclasses.replace(FAST, cache_interval=4)),
    ):
        result = calotype("generate", *common, "-o", f"{name}.png", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        text = read_parameters(tmp_path / f"{name}.png")
        assert f"Cache interval: {acceleration.cache_interval}" in text
        assert ("CFG interval" in text) is (acceleration.guidance_interval is not None)
        expected = pipeline("red", fast=acceleration, **SETTINGS | {"output_type": "pil"}).images[0]
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.tobytes() == expected.tobytes()
    bad = calotype("generate", *common, "--cache-interval", "0", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1
