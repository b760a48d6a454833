"""Pictures with image prompts against diffusers' pipelines, and with all that goes together with them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.control import Control
from calotype.runtime.denoising.acceleration import FAST, Acceleration
from calotype.runtime.errors import BundleError, CalotypeError, InputError
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pictures.parameters import parse_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from tests.runtime.adapters.test_lora import fused, kohya, saved, sd1_kohya_names, weights_of
from tests.runtime.command_line import calotype
from tests.runtime.conftest import Model
from tests.runtime.references import diffusers_pipeline, draws, injected, psnr
from tests.runtime.test_controlnet import reference

SIZE = {"height": 32, "width": 48}
STEPS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
LAYERED = {"down": {"block_0": 0.3}, "up": {"block_1": [0.0, 1.5]}}
XL_LAYERED = {"mid": 0.7, "up": {"block_0": [0.0, 1.5]}}


def picture(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    """Patches of colours, which an image encoder tells apart."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path, ip_adapters: dict[str, Model], controlnets: tuple[Model, ...]) -> Any:
    folders = {kind: model.bundle for kind, model in ip_adapters.items()}
    with Pipeline.load(tiny_bundle, image_prompts=folders, controls={"one": controlnets[0].bundle}) as opened:
        yield opened


def with_adapters(other: Any, adapters: Sequence[Model], scales: list[Any]) -> Any:
    """Diffusers' pipeline with those files loaded, and the image encoder beside the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = [str(model.checkpoint.parent) for model in adapters]
        other.load_ip_adapter(folders, [""] * len(folders), [model.checkpoint.name for model in adapters])
        other.image_encoder.float()
        other.set_ip_adapter_scale(scales)
    return other


def drawn(pipeline: Pipeline, **settings: Any) -> NDArray[Any]:
    """The picture, which is not the one without its image prompts."""
    given = {"output_type": "np", "seed": 5, "negative_prompt": "le", **STEPS, **settings}
    prompted: NDArray[Any] = pipeline("red apple", **given).images[0]
    without = pipeline("red apple", **{**given, "image_prompts": ()}).images[0]
    assert psnr(prompted, without) < 45  # so that 50 are missed where the adapter is taken away
    return prompted


CASES: dict[str, list[tuple[str, list[int], Any]]] = {
    "plain": [("plain", [1], 0.8)],
    "plus": [("plus", [1], 1.0)],
    "full": [("full", [1], 0.7)],
    "two pictures": [("plain", [1, 2], 1.0)],
    "two pictures, plus": [("plus", [1, 2], 0.9)],
    "two adapters": [("plain", [1], 0.6), ("plus", [2, 3], 0.7)],
    "layers": [("plain", [1], LAYERED)],
}


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_text_to_image_equals_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, ip_adapters: dict[str, Model], case: str, guidance_scale: float
) -> None:
    if guidance_scale == 1 and case not in ("two adapters", "plus"):
        pytest.skip("without guidance two cases are enough")
    other = diffusers_pipeline(tiny_checkpoint, "StableDiffusionPipeline")
    asked = CASES[case]
    with_adapters(other, [ip_adapters[kind] for kind, _, _ in asked], [scale for _, _, scale in asked])
    images = [[picture(seed) for seed in seeds] for _, seeds, _ in asked]
    settings = {**STEPS, "guidance_scale": guidance_scale}
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple", ip_adapter_image=images, negative_prompt="le", output_type="np", **SIZE, **settings
        ).images[0]
    prompts = [
        ImagePrompt(model=kind, images=tuple(own), scale=scale)
        for (kind, _, scale), own in zip(asked, images, strict=True)
    ]
    assert psnr(drawn(pipeline, image_prompts=prompts, **SIZE, guidance_scale=guidance_scale), expected) >= 50


@pytest.mark.parametrize(
    "asked",
    [[("plain", 1, 0.8)], [("plus", 1, 1.0)], [("plain", 1, XL_LAYERED), ("plus", 2, 0.5)]],
    ids=["plain", "plus", "two, and layers"],
)
def test_sdxl_equals_diffusers_to_50_db(
    sdxl: Model, sdxl_ip_adapters: dict[str, Model], asked: list[tuple[str, int, Any]]
) -> None:
    other = diffusers_pipeline(sdxl.checkpoint, "StableDiffusionXLPipeline")
    with_adapters(other, [sdxl_ip_adapters[kind] for kind, _, _ in asked], [scale for _, _, scale in asked])
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple", ip_adapter_image=[picture(seed) for _, seed, _ in asked], negative_prompt="le",
            output_type="np", **SIZE, **STEPS,
        ).images[0]  # fmt: skip
    folders = {kind: model.bundle for kind, model in sdxl_ip_adapters.items()}
    prompts = [ImagePrompt(model=kind, images=(picture(seed),), scale=scale) for kind, seed, scale in asked]
    with Pipeline.load(sdxl.bundle, image_prompts=folders) as opened:
        assert psnr(drawn(opened, image_prompts=prompts, **SIZE), expected) >= 50


def test_with_a_control_a_lora_and_a_picture_to_start_from_it_equals_diffusers_to_50_db(
    pipeline: Pipeline,
    tiny_checkpoint: Path,
    ip_adapters: dict[str, Model],
    controlnets: tuple[Model, ...],
    tmp_path: Path,
) -> None:
    other = reference(tiny_checkpoint, [controlnets[0].checkpoint], "StableDiffusionControlNetImg2ImgPipeline")
    lora = saved(tmp_path / "a.safetensors", kohya(weights_of(other), sd1_kohya_names()))
    fused(other, (lora, 0.05))
    with_adapters(other, [ip_adapters["plus"]], [0.8])
    noise, posterior = draws(5, (4, 16, 24), 2)
    with injected(other, noise=noise, posteriors=[posterior]):
        expected = other(
            "red apple", image=picture(3, 32, 48), control_image=picture(4, 32, 48), ip_adapter_image=[picture(1)],
            negative_prompt="le", output_type="np", strength=0.6, controlnet_conditioning_scale=1.0,
            control_guidance_end=0.7, num_inference_steps=6, guidance_scale=3.0,
        ).images[0]  # fmt: skip
    got = drawn(
        pipeline,
        image_prompts=[ImagePrompt(model="plus", images=(picture(1),), scale=0.8)],
        controls=[Control(model="one", image=picture(4, 32, 48), end=0.7)],
        loras=[Lora(path=lora, scale=0.05)],
        image=picture(3, 32, 48),
        strength=0.6,
        num_inference_steps=6,
    )
    assert psnr(got, expected) >= 50


def test_inpainting_equals_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, ip_adapters: dict[str, Model]
) -> None:
    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 6, 32, 24))
    inside = np.asarray(mask) > 0
    other = diffusers_pipeline(tiny_checkpoint, "StableDiffusionInpaintPipeline")
    with_adapters(other, [ip_adapters["plain"]], [1.0])
    noise, posterior, unused = draws(5, (4, 16, 24), 3)
    with injected(other, noise=noise, posteriors=[posterior, unused]):
        expected = other(
            "red apple", image=picture(3, 32, 48), mask_image=mask, ip_adapter_image=[picture(1)],
            negative_prompt="le", output_type="np", strength=1.0, **SIZE, **STEPS,
        ).images[0]  # fmt: skip
    prompt = ImagePrompt(model="plain", images=(picture(1),))
    got = drawn(pipeline, image_prompts=[prompt], image=picture(3, 32, 48), mask_image=mask)
    assert psnr(got[inside], expected[inside]) >= 50


def requests() -> list[Request]:
    """Jobs of all kinds, of which some share runs: none, one, two adapters, a control, unguided, guided a while."""
    plain = ImagePrompt(model="plain", images=(picture(1),))
    plus = ImagePrompt(model="plus", images=(picture(2),), scale=0.7)
    control = Control(model="one", image=picture(4), end=0.5)
    common = {"height": 32, "width": 48, "num_inference_steps": 4}
    return [
        Request(prompt="red apple", seed=1, **common),
        Request(prompt="red apple", seed=2, image_prompts=(plain,), **common),
        Request(prompt="a", seed=3, image_prompts=(dataclasses.replace(plain, images=(picture(3),)),), **common),
        Request(prompt="a", seed=4, image_prompts=(plain, plus), guidance_scale=1.0, **common),
        Request(prompt="le", seed=5, image_prompts=(plus,), controls=(control,), **common),
        Request(prompt="le", seed=6, image_prompts=(plain,), scheduler="heun", **common),
        Request(prompt="le", seed=7, image_prompts=(plain,), guidance_interval=(0.5, 5.0), **common),
        Request(prompt="le", seed=8, image_prompts=(plus,), fast=FAST, **common),
        Request(prompt="le", seed=9, controls=(control,), **common),
    ]


def test_a_picture_is_the_same_alone_and_in_any_batch(pipeline: Pipeline) -> None:
    alone = [next(iter(pipeline.draw([request])))[1].image.tobytes() for request in requests()]
    assert len(set(alone)) == len(alone)
    together = dict(pipeline.draw(requests()))
    assert [together[number].image.tobytes() for number in range(len(alone))] == alone
    again = dict(pipeline.draw([*reversed(requests()), *requests()]))
    assert [again[number].image.tobytes() for number in range(2 * len(alone))] == [*reversed(alone), *alone]


def test_a_scale_of_zero_and_no_image_prompt_draw_the_same_to_90_db(pipeline: Pipeline, tiny_bundle: Path) -> None:
    settings: dict[str, Any] = {"seed": 3, "output_type": "np", **STEPS, **SIZE}
    none = ImagePrompt(model="plus", images=(picture(1),), scale=0)
    got = pipeline("a", image_prompts=[none], **settings).images[0]
    with Pipeline.load(tiny_bundle) as plain:
        expected = plain("a", **settings).images[0]
    assert psnr(got, expected) >= 90
    assert np.array_equal(pipeline("a", **settings).images[0], expected)


def test_pictures_are_encoded_once_and_rows_written_once(pipeline: Pipeline) -> None:
    adapter = pipeline._ip_adapters.of("plain")
    session = adapter._sessions["image_encoder"]
    runs, run = [], session.run

    def watched(sizes: Any) -> None:
        runs.append(sizes)
        run(sizes)

    session.run = watched  # type: ignore[method-assign]
    try:
        prompt = ImagePrompt(model="plain", images=(picture(21), picture(22)))
        pipeline(["a", "le"], image_prompts=[prompt], num_images_per_prompt=2, **SIZE, **STEPS)
        pipeline("red apple", image_prompts=[dataclasses.replace(prompt, scale=0.2)], **SIZE, **STEPS)
        assert len(runs) == 2
    finally:
        session.run = run  # type: ignore[method-assign]


def test_low_memory_draws_the_same(pipeline: Pipeline, tiny_bundle: Path, ip_adapters: dict[str, Model]) -> None:
    prompt = ImagePrompt(model="plus", images=(picture(1),))
    settings: dict[str, Any] = {"seed": 3, "image_prompts": [prompt], **STEPS, **SIZE}
    with Pipeline.load(tiny_bundle, low_memory=True, image_prompts={"plus": ip_adapters["plus"].bundle}) as low:
        assert low("a", **settings).images[0].tobytes() == pipeline("a", **settings).images[0].tobytes()


def prompt(**changes: Any) -> ImagePrompt:
    return ImagePrompt(**{"model": "plain", "images": (picture(1),), **changes})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([prompt(model="three")], r"there is no image prompt 'three'; known: plain, plus, full; load the pipeline"),
        ([prompt(images=("no.png",))], r"no\.png does not exist"),
        ([prompt(images=(__file__,))], r"test_ip_adapter\.py"),
        ([prompt()] * 5, "5 image prompts are more than the 4 that one picture takes; use fewer"),
        ([3], r"image_prompts=\[3\] is no list of image prompts; give \[ImagePrompt\(model=…, images=\[…\]\)\]"),
        ([prompt(scale={"up": {"block_0": 1}})], "scale is of up_0, which reads no prompt in this UNet; valid: down_0"),
        ([prompt(scale={"up": {"block_1": [1, 2, 3]}})], r"has \[1.0, 2.0, 3.0\] for up_1, which attends .* 2 times"),
    ],
)
def test_bad_image_prompts_get_one_line(pipeline: Pipeline, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", image_prompts=prompts, **SIZE)
    assert "\n" not in str(caught.value)


def test_caching_and_image_prompts_exclude_each_other(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="cache_interval and image_prompts exclude each other; use one of them"):
        pipeline("a", image_prompts=[prompt()], fast=Acceleration(cache_interval=2), **SIZE)


def test_a_bundle_that_does_not_fit_is_refused_in_one_line(
    tiny_bundle: Path, format1: Path, sdxl: Model, sdxl_ip_adapters: dict[str, Model], ip_adapters: dict[str, Model]
) -> None:
    refused: list[tuple[Path, Path, type[CalotypeError], str]] = [
        (
            tiny_bundle, sdxl_ip_adapters["plain"].bundle, InputError,
            "is an IP-Adapter for models of .* cross-attentions to text of width 56, .* has 4 of 32, as sd1; use one",
        ),
        (sdxl.bundle, ip_adapters["plus"].bundle, InputError, "to text of width 32, as ip-adapter, and .*, as sdxl;"),
        (tiny_bundle, tiny_bundle, BundleError, "is a bundle of the kind 'model', and ip-adapter is needed"),
        (ip_adapters["plus"].bundle, ip_adapters["plus"].bundle, BundleError, "'ip-adapter', and model is needed"),
        (format1, ip_adapters["plus"].bundle, BundleError, "has no unet_image_prompt, which image prompts take"),
    ]  # fmt: skip
    for model, adapter, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            Pipeline.load(model, image_prompts={"one": adapter})
        assert "\n" not in str(caught.value)


def test_a_bundle_without_one_of_its_networks_is_refused(
    tiny_bundle: Path, ip_adapters: dict[str, Model], tmp_path: Path
) -> None:
    shutil.copytree(ip_adapters["plus"].bundle, tmp_path / "ip")
    manifest = tmp_path / "ip" / "calotype.json"
    value = json.loads(manifest.read_text())
    del value["networks"]["image_projection"], value["sha256"]
    manifest.write_text(json.dumps(value))
    with pytest.raises(BundleError, match="has no image_projection; export the bundle again"):
        Pipeline.load(tiny_bundle, image_prompts={"plus": tmp_path / "ip"})


def test_the_command_line_draws_with_image_prompts_and_again(
    tiny_bundle: Path, ip_adapters: dict[str, Model], tmp_path: Path
) -> None:
    for seed in (1, 2):
        picture(seed).save(tmp_path / f"{seed}.png")
    folders = [f"--folder={path}" for path in (tmp_path, tiny_bundle)]
    folders += [f"--folder={ip_adapters[kind].bundle}" for kind in ("plain", "plus")]
    ran = calotype(
        "generate", "red apple", "--model", tiny_bundle, "--output", tmp_path / "a.png", "--seed", "3", "--steps", "3",
        "--width", "48", "--height", "32",
        "--image-prompt", f"face={ip_adapters['plain'].bundle}:{tmp_path / '1.png'},{tmp_path / '2.png'}:0.6",
        "--image-prompt", f"style={ip_adapters['plus'].bundle}:{tmp_path / '2.png'}",
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    text = parse_parameters(read_parameters(tmp_path / "a.png")).further["IP-Adapters"]
    for part in ('"model": "ip_adapter_plain"', '"images": ["1.png", "2.png"]', '"scale": 0.6', '"model_hash": "'):
        assert part in text
    again = calotype("generate", "--again", tmp_path / "a.png", "--output", tmp_path / "b.png", *folders)
    assert (again.returncode, again.stderr) == (0, "")
    first = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(first, np.asarray(Image.open(tmp_path / "b.png")))
    picture(3).save(tmp_path / "1.png")
    gone = calotype("generate", "--again", tmp_path / "a.png", "--output", tmp_path / "c.png", *folders)
    assert (gone.returncode, "the picture of image prompt 0 was '1.png', and no picture in" in gone.stderr) == (2, True)
    twice = calotype(
        "generate", "a", "--image-prompt", f"x=a:{tmp_path / '1.png'}", "--image-prompt", f"x=b:{tmp_path / '1.png'}"
    )
    assert "two image prompts are named x, and have different bundles" in twice.stderr


def test_a_picture_by_layers_carries_them_and_is_drawn_again(
    pipeline: Pipeline, tiny_bundle: Path, ip_adapters: dict[str, Model], tmp_path: Path
) -> None:
    from calotype.runtime.recall import recall

    picture(1).save(tmp_path / "1.png")
    asked = [ImagePrompt(model="plain", images=tmp_path / "1.png", scale=LAYERED)]  # type: ignore[arg-type]
    made = pipeline("a", image_prompts=asked, seed=3, **STEPS, **SIZE).pictures[0]
    made.save(tmp_path / "a.png")
    found = recall(read_parameters(tmp_path / "a.png"), [tmp_path, tiny_bundle, ip_adapters["plain"].bundle])
    assert found.request.image_prompts[0].scale == asked[0].scale
    with Pipeline.load(found.model) as opened:
        again = next(iter(opened.draw([found.request])))[1]
    assert again.image.tobytes() == made.image.tobytes()
    of_memory = pipeline("a", image_prompts=[prompt()], seed=3, **STEPS, **SIZE).pictures[0]
    of_memory.save(tmp_path / "b.png")
    folders = [tmp_path, tiny_bundle, ip_adapters["plain"].bundle]
    assert recall(read_parameters(tmp_path / "b.png"), folders).request.image_prompts[0].images == (tmp_path / "1.png",)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match="the picture of image prompt 0 was no file, and no picture in"):
        recall(read_parameters(tmp_path / "b.png"), folders)
