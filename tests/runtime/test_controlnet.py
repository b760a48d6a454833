"""Pictures with ControlNets against diffusers' pipelines, the zero convolutions given values: else they add nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.control import Control
from calotype.runtime.errors import BundleError, CalotypeError, InputError
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pictures.parameters import parse_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from tests.runtime.adapters.test_lora import fused, kohya, saved, sd1_kohya_names, weights_of
from tests.runtime.command_line import calotype
from tests.runtime.conftest import Model
from tests.runtime.lora_files import UNET, write_lora
from tests.runtime.references import draws, injected, psnr

SIZE = {"height": 32, "width": 48}
STEPS: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path, controlnets: tuple[Model, ...]) -> Any:
    names = ("one", "two", "pooled")
    folders = {name: model.bundle for name, model in zip(names, controlnets, strict=True)}
    with Pipeline.load(tiny_bundle, controls=folders) as opened:
        yield opened


def reference(checkpoint: Path, controls: Sequence[Path], class_name: str, scheduler: str | None = None) -> Any:
    """Diffusers' pipeline of the checkpoint with those ControlNets, fp16 weights computed in float32."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        nets = [diffusers.ControlNetModel.from_pretrained(path, torch_dtype=torch.float16) for path in controls]
        given = nets[0] if len(nets) == 1 else nets
        made = getattr(diffusers, class_name).from_pretrained(checkpoint, controlnet=given, torch_dtype=torch.float16)
        made = made.to(torch.float32)
        if scheduler is not None:
            made.scheduler = getattr(diffusers, scheduler).from_config(made.scheduler.config)
        made.set_progress_bar_config(disable=True)
    return made


def drawn(pipeline: Pipeline, **settings: Any) -> NDArray[Any]:
    """The picture, which is not the one without its controls."""
    given = {"output_type": "np", "seed": 5, "negative_prompt": "le", **STEPS, **settings}
    with_control: NDArray[Any] = pipeline("red apple", **given).images[0]
    without = pipeline("red apple", **{**given, "controls": ()}).images[0]
    assert psnr(with_control, without) < 45  # so that 50 are missed where the control is taken away
    return with_control


@pytest.mark.parametrize("scheduler", [("ddim", "DDIMScheduler"), ("heun", "HeunDiscreteScheduler")])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"scale": 2.0, "start": 0.2, "end": 0.7}, {"controlnet_conditioning_scale": 2.0, "control": (0.2, 0.7)}),
        ({"guess": True}, {"guess_mode": True}),
        ({"model": "pooled", "scale": 0.8}, {"controlnet_conditioning_scale": 0.8}),
    ],
    ids=["whole", "a share of the steps", "guess mode", "pooled"],
)
def test_text_to_image_equals_diffusers_to_50_db(
    pipeline: Pipeline,
    tiny_checkpoint: Path,
    controlnets: tuple[Model, ...],
    scheduler: tuple[str, str],
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    used = controlnets[2 if ours.get("model") == "pooled" else 0].checkpoint
    other = reference(tiny_checkpoint, [used], "StableDiffusionControlNetPipeline", scheduler[1])
    settings = {name: value for name, value in theirs.items() if name != "control"}
    if "control" in theirs:
        settings["control_guidance_start"], settings["control_guidance_end"] = theirs["control"]
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple", picture(1), negative_prompt="le", output_type="np", **SIZE, **STEPS, **settings
        ).images[0]
    control = Control(**{"model": "one", "image": picture(1), **ours})
    got = drawn(pipeline, controls=[control], scheduler=scheduler[0], **SIZE)
    assert psnr(got, expected) >= 50


def test_several_equal_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, controlnets: tuple[Model, ...]
) -> None:
    paths = [model.checkpoint for model in controlnets[:2]]
    other = reference(tiny_checkpoint, paths, "StableDiffusionControlNetPipeline")
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple",
            [picture(1), picture(2)],
            negative_prompt="le",
            output_type="np",
            controlnet_conditioning_scale=[0.5, 0.9],
            control_guidance_end=[1.0, 0.5],
            **SIZE,
            **STEPS,
        ).images[0]
    controls = [
        Control(model="one", image=picture(1), scale=0.5),
        Control(model="two", image=picture(2), scale=0.9, end=0.5),
    ]
    assert psnr(drawn(pipeline, controls=controls, **SIZE), expected) >= 50


def test_image_to_image_equals_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, controlnets: tuple[Model, ...]
) -> None:
    other = reference(tiny_checkpoint, [controlnets[0].checkpoint], "StableDiffusionControlNetImg2ImgPipeline")
    noise, posterior = draws(5, (4, 16, 24), 2)
    with injected(other, noise=noise, posteriors=[posterior]):
        expected = other(
            "red apple",
            image=picture(3),
            control_image=picture(1),
            negative_prompt="le",
            output_type="np",
            strength=0.6,
            controlnet_conditioning_scale=1.0,
            control_guidance_end=0.7,
            **SIZE,
            **STEPS,
        ).images[0]
    control = Control(model="one", image=picture(1), end=0.7)
    got = drawn(pipeline, controls=[control], image=picture(3), strength=0.6)
    assert psnr(got, expected) >= 50


def test_inpainting_equals_diffusers_to_50_db(
    pipeline: Pipeline, tiny_checkpoint: Path, controlnets: tuple[Model, ...]
) -> None:
    import torch

    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 6, 32, 24))
    inside = np.asarray(mask) > 0
    hint = np.asarray(picture(3), np.float32).transpose(2, 0, 1)[None] / 255
    hint[:, :, inside] = -1
    other = reference(tiny_checkpoint, [controlnets[0].checkpoint], "StableDiffusionControlNetInpaintPipeline")
    noise, posterior, unused = draws(5, (4, 16, 24), 3)
    with injected(other, noise=noise, posteriors=[posterior, unused]):
        expected = other(
            "red apple",
            image=picture(3),
            mask_image=mask,
            control_image=torch.from_numpy(hint),
            negative_prompt="le",
            output_type="np",
            controlnet_conditioning_scale=1.0,
            **SIZE,
            **STEPS,
            strength=1.0,
        ).images[0]
    control = Control(model="one", preprocess="inpaint")
    got = drawn(pipeline, controls=[control], image=picture(3), mask_image=mask)
    assert psnr(got[inside], expected[inside]) >= 50


@pytest.mark.parametrize("preprocess", [None, "inpaint"], ids=["a ControlNet", "a ControlNet of inpainting"])
def test_a_nine_channel_unet_equals_diffusers_to_50_db(
    sd2_inpainting: Model, sd2_controlnet: Model, preprocess: str | None
) -> None:
    """Diffusers draws with both since its inpainting pipeline looks at the UNet's channels."""
    import torch

    mask = Image.new("L", (48, 32))
    mask.paste(255, (8, 6, 32, 24))
    inside = np.asarray(mask) > 0
    hint = np.asarray(picture(3 if preprocess else 1), np.float32).transpose(2, 0, 1)[None] / 255
    if preprocess:
        hint[:, :, inside] = -1
    name = "StableDiffusionControlNetInpaintPipeline"
    other = reference(sd2_inpainting.checkpoint, [sd2_controlnet.checkpoint], name)
    noise, posterior = draws(5, (4, 16, 24), 2)
    with injected(other, noise=noise, posteriors=[posterior]):
        expected = other(
            "red apple", image=picture(3), mask_image=mask, control_image=torch.from_numpy(hint), negative_prompt="le",
            output_type="np", controlnet_conditioning_scale=1.0, strength=1.0, **SIZE, **STEPS,
        ).images[0]  # fmt: skip
    control = Control(model="two", image=None if preprocess else picture(1), preprocess=preprocess)
    with Pipeline.load(sd2_inpainting.bundle, controls={"two": sd2_controlnet.bundle}) as opened:
        got = drawn(opened, controls=[control], image=picture(3), mask_image=mask)
    assert psnr(got[inside], expected[inside]) >= 50


def test_sdxl_equals_diffusers_to_50_db(sdxl: Model, sdxl_controlnet: Model) -> None:
    other = reference(sdxl.checkpoint, [sdxl_controlnet.checkpoint], "StableDiffusionXLControlNetPipeline")
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other(
            "red apple", image=picture(1), negative_prompt="le", output_type="np", **SIZE, **STEPS,
            controlnet_conditioning_scale=1.0,
        ).images[0]  # fmt: skip
    with Pipeline.load(sdxl.bundle, controls={"xl": sdxl_controlnet.bundle}) as opened:
        got = drawn(opened, controls=[Control(model="xl", image=picture(1))], **SIZE)
    assert psnr(got, expected) >= 50


def test_a_lora_goes_with_it(
    pipeline: Pipeline, tiny_checkpoint: Path, controlnets: tuple[Model, ...], tmp_path: Path
) -> None:
    other = reference(tiny_checkpoint, [controlnets[0].checkpoint], "StableDiffusionControlNetPipeline")
    lora = saved(tmp_path / "a.safetensors", kohya(weights_of(other), sd1_kohya_names()))
    control = Control(model="one", image=picture(1))
    before = drawn(pipeline, controls=[control], **SIZE)
    pipeline.set_loras([Lora(path=lora, scale=0.05)])
    try:
        got = drawn(pipeline, controls=[control], **SIZE)
    finally:
        pipeline.set_loras([])
    fused(other, (lora, 0.05))
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        expected = other("red apple", picture(1), negative_prompt="le", output_type="np", **SIZE, **STEPS).images[0]
    assert psnr(got, expected) >= 50
    assert psnr(got, before) < 45
    assert drawn(pipeline, controls=[control], **SIZE).tobytes() == before.tobytes()


def requests() -> list[Request]:
    """Jobs of all kinds, of which some share runs: none, one, two ControlNets, guessing, over early, unguided."""
    one, two = Control(model="one", image=picture(1)), Control(model="two", image=picture(2), scale=0.4)
    common = {"height": 32, "width": 48, "num_inference_steps": 4}
    return [
        Request(prompt="red apple", seed=1, **common),
        Request(prompt="red apple", seed=2, controls=(one,), **common),
        Request(prompt="a", seed=3, controls=(dataclasses.replace(one, image=picture(3), end=0.5),), **common),
        Request(prompt="a", seed=4, controls=(one, two), guidance_scale=1.0, **common),
        Request(prompt="le", seed=5, controls=(dataclasses.replace(one, guess=True), two), **common),
        Request(prompt="le", seed=6, controls=(two, one), scheduler="heun", **common),
        Request(prompt="le", seed=7, controls=(one, dataclasses.replace(one, image=picture(4))), **common),
    ]


def test_a_picture_is_the_same_alone_and_in_any_batch(pipeline: Pipeline) -> None:
    alone = [next(iter(pipeline.draw([request])))[1].image.tobytes() for request in requests()]
    assert len(set(alone)) == len(alone)
    together = dict(pipeline.draw(requests()))
    assert [together[number].image.tobytes() for number in range(len(alone))] == alone
    again = dict(pipeline.draw([*reversed(requests()), *requests()]))
    assert [again[number].image.tobytes() for number in range(2 * len(alone))] == [*reversed(alone), *alone]


def test_loras_of_a_call_go_with_it_and_stay_apart_in_a_batch(
    pipeline: Pipeline, tiny_bundle: Path, tmp_path: Path
) -> None:
    lora = Lora(path=write_lora(tmp_path / "a.safetensors", 1, (UNET,), bundle=tiny_bundle))
    control = Control(model="one", image=picture(1))
    plain = Request(prompt="a", seed=1, height=32, width=48, num_inference_steps=2)
    kinds: list[dict[str, Any]] = [
        {"loras": loras, "controls": own} for loras in ((), (lora,)) for own in ((), (control,))
    ]
    asked = [dataclasses.replace(plain, **kind) for kind in kinds]
    alone = [next(iter(pipeline.draw([request])))[1].image.tobytes() for request in asked]
    assert len(set(alone)) == 4
    together = dict(pipeline.draw([*asked, *reversed(asked)]))
    assert [together[number].image.tobytes() for number in range(8)] == [*alone, *reversed(alone)]
    runs = {pipeline.prepare(request).key for request in asked}
    assert {(key.session.network, key.session.weights) for key in runs} == {
        (network, weights)
        for network in ("unet", "unet_control")
        for weights in ((), together[2].settings.request.loras)
    }
    assert all(not isinstance(control.session.weights, tuple) for key in runs for control in key.controls)


def test_it_is_run_for_the_rows_and_steps_that_it_controls_alone(pipeline: Pipeline) -> None:
    rows: list[int] = []
    session = pipeline._controlnets.session(pipeline._controlnets.named["one"].key)
    run = session.run

    def watched(sizes: Any) -> None:
        rows.append(sizes["rows"])
        run(sizes)

    session.run = watched  # type: ignore[method-assign]
    try:
        for change, expected in (
            ({}, [2] * 4),
            ({"end": 0.5}, [2] * 2),
            ({"start": 0.5}, [2] * 2),
            ({"guess": True}, [1] * 4),
        ):
            rows.clear()
            control = Control(model="one", image=picture(1), **change)
            pipeline("a", controls=[control], num_inference_steps=4, guidance_scale=2.0, scheduler="ddim", **SIZE)
            assert rows == expected
        rows.clear()
        control = Control(model="one", image=picture(1))
        pipeline("a", controls=[control], num_inference_steps=4, guidance_scale=1.0, scheduler="ddim", **SIZE)
        assert rows == [1] * 4
    finally:
        session.run = run  # type: ignore[method-assign]


def test_without_controls_a_pipeline_that_has_them_draws_what_one_without_draws(
    pipeline: Pipeline, tiny_bundle: Path
) -> None:
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, **SIZE}
    with Pipeline.load(tiny_bundle) as plain:
        expected = plain("a", **settings).images[0].tobytes()
        control = Control(model=pipeline._controlnets.named["one"].bundle.path, image=picture(1))
        by_path = plain("a", controls=[control], **settings).images[0].tobytes()
        assert plain("a", **settings).images[0].tobytes() == expected
    assert pipeline("a", **settings).images[0].tobytes() == expected
    named = dataclasses.replace(control, model="one")
    assert pipeline("a", controls=[named], **settings).images[0].tobytes() == by_path != expected


def test_low_memory_draws_the_same(pipeline: Pipeline, tiny_bundle: Path, controlnets: tuple[Model, ...]) -> None:
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, **SIZE}
    settings["controls"] = [Control(model="one", image=picture(1)), Control(model="one", image=picture(2), end=0.5)]
    with Pipeline.load(tiny_bundle, low_memory=True, controls={"one": controlnets[0].bundle}) as low:
        assert low("a", **settings).images[0].tobytes() == pipeline("a", **settings).images[0].tobytes()


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ([Control(model="three", image=picture(1))], r"there is no control 'three'; known: one, two, pooled; load"),
        ([Control(model="one")], "a control has no picture, and there is none to start from; give one of them"),
        ([Control(model="one", image="no.png")], r"no\.png does not exist"),
        (
            [Control(model="one", image=picture(1), preprocess="inpaint")],
            "a control of inpainting takes the mask of the picture; give image and mask_image",
        ),
        ([Control(model="one", image=picture(1))] * 9, "9 controls are more than the 8 that one picture takes"),
        ([3], r"controls=\[3\] is no list of controls; give \[Control\(model=…, image=…\)\]"),
    ],
)
def test_bad_controls_get_one_line(pipeline: Pipeline, controls: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipeline("a", controls=controls, **SIZE)
    assert "\n" not in str(caught.value)


def test_caching_and_controls_exclude_each_other(pipeline: Pipeline) -> None:
    from calotype.runtime.denoising.acceleration import Acceleration

    with pytest.raises(InputError, match="cache_interval and controls exclude each other; use one of them"):
        pipeline("a", controls=[Control(model="one", image=picture(1))], fast=Acceleration(cache_interval=2), **SIZE)


def test_a_bundle_that_does_not_fit_is_refused_in_one_line(
    tiny_bundle: Path, format1: Path, sdxl: Model, sdxl_controlnet: Model, controlnets: tuple[Model, ...]
) -> None:
    refused: list[tuple[Path, Path, type[CalotypeError], str]] = [
        (
            tiny_bundle,
            sdxl_controlnet.bundle,
            InputError,
            r"is a ControlNet for models as sdxl \(56\), and tiny is sd1",
        ),
        (sdxl.bundle, controlnets[0].bundle, InputError, r"is a ControlNet for models as sd1 \(32\), and .* is sdxl"),
        (tiny_bundle, tiny_bundle, BundleError, "is a bundle of the kind 'model', and control is needed"),
        (controlnets[0].bundle, controlnets[0].bundle, BundleError, "of the kind 'control', and model is needed"),
        (
            format1,
            controlnets[0].bundle,
            BundleError,
            "has no unet_control, which controls add to; export the bundle",
        ),
    ]
    for model, control, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            Pipeline.load(model, controls={"one": control})
        assert "\n" not in str(caught.value)


def test_the_command_line_draws_with_controls_and_again(
    tiny_bundle: Path, controlnets: tuple[Model, ...], tmp_path: Path
) -> None:
    picture(1).save(tmp_path / "edges.png")
    folders = [f"--folder={tmp_path}", f"--folder={tiny_bundle}"]
    folders += [f"--folder={model.bundle}" for model in controlnets[:2]]
    ran = calotype(
        "generate", "red apple", "--model", tiny_bundle, "--output", tmp_path / "a.png", "--seed", "3", "--steps", "3",
        "--width", "48", "--height", "32", "--guess-mode",
        "--control", f"canny={controlnets[0].bundle}:{tmp_path / 'edges.png'}:0.8:0:0.6",
        "--control", f"other={controlnets[1].bundle}:threshold@{tmp_path / 'edges.png'}",
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    text = parse_parameters(read_parameters(tmp_path / "a.png")).further["ControlNets"]
    for part in ('"scale": 0.8', '"end": 0.6', '"guess": true', '"preprocess": "threshold"', '"image": "edges.png"'):
        assert part in text
    again = calotype("generate", "--again", tmp_path / "a.png", "--output", tmp_path / "b.png", *folders)
    assert (again.returncode, again.stderr) == (0, "")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))
    (tmp_path / "edges.png").write_bytes(b"other")
    gone = calotype("generate", "--again", tmp_path / "a.png", "--output", tmp_path / "c.png", *folders)
    assert gone.returncode == 2
    assert "the picture of control 0 was 'edges.png', and no picture in" in gone.stderr
    assert "name that folder with --folder" in gone.stderr


def test_pictures_that_were_no_files_are_found_again_by_their_pixels(
    pipeline: Pipeline, tiny_bundle: Path, controlnets: tuple[Model, ...], tmp_path: Path
) -> None:
    grey, other = picture(1).convert("L"), picture(2)
    controls = [Control(model="one", image=grey), Control(model="one", image=np.asarray(other), scale=0.5)]
    drawn = pipeline("a", controls=controls, image=picture(3), strength=0.5, num_inference_steps=4, seed=1)
    drawn.pictures[0].save(tmp_path / "a.png")
    picture(3).save(tmp_path / "start.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.png").write_bytes(b"none")
    folders = [f"--folder={path}" for path in (tiny_bundle, controlnets[0].bundle, tmp_path / "more")]
    command = ("generate", "--again", tmp_path / "a.png", "--image", tmp_path / "start.png", *folders)
    grey.save(tmp_path / "more" / "any.png")
    gone = calotype(*command, "--output", tmp_path / "b.png")
    assert gone.returncode == 2
    assert "the picture of control 1 was no file, and no picture in" in gone.stderr
    other.save(tmp_path / "more" / "another.png")
    again = calotype(*command, "--output", tmp_path / "b.png")
    assert (again.returncode, again.stderr) == (0, "")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))
