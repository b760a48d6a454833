"""Pictures with a ControlNet for several kinds of pictures against diffusers' pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from calotype.runtime.control import Control
from calotype.runtime.control_modes import MODES, mode_number
from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from tests.runtime.conftest import Model
from tests.runtime.references import draws, injected, psnr
from tests.runtime.test_controlnet import SIZE, STEPS, drawn, picture


@pytest.fixture(scope="module")
def pipeline(sdxl: Model, sdxl_union: Model) -> Any:
    with Pipeline.load(sdxl.bundle, controls=dict.fromkeys(("canny", "Depth", "any"), sdxl_union.bundle)) as opened:
        yield opened


def expected(checkpoint: Path, union: Path, images: Sequence[Any], modes: Sequence[int], **settings: Any) -> Any:
    """Diffusers' picture, fp16 weights computed in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        net = diffusers.ControlNetUnionModel.from_pretrained(union, torch_dtype=torch.float16)
        other = diffusers.StableDiffusionXLControlNetUnionPipeline.from_pretrained(
            checkpoint, controlnet=net, torch_dtype=torch.float16
        ).to(torch.float32)
        other.set_progress_bar_config(disable=True)
    with injected(other, noise=draws(5, (4, 16, 24), 1)[0]):
        return other(
            "red apple", control_image=list(images), control_mode=list(modes), negative_prompt="le", output_type="np",
            **{**SIZE, **STEPS, **settings},
        ).images[0]  # fmt: skip


def test_one_picture_equals_diffusers_to_50_db(pipeline: Pipeline, sdxl: Model, sdxl_union: Model) -> None:
    wanted = expected(
        sdxl.checkpoint, sdxl_union.checkpoint, [picture(1)], [3], controlnet_conditioning_scale=0.7,
        control_guidance_end=0.7,
    )  # fmt: skip
    control = Control(model="canny", image=picture(1), scale=0.7, end=0.7)
    assert psnr(drawn(pipeline, controls=[control], **SIZE), wanted) >= 50
    other = Control(model="any", mode="normal", image=picture(1), scale=0.7, end=0.7)
    assert psnr(drawn(pipeline, controls=[other], **SIZE), wanted) < 50  # its kind counts
    named = Control(model="any", mode=3, image=picture(1), scale=0.7, end=0.7)
    assert psnr(drawn(pipeline, controls=[named], **SIZE), wanted) >= 50


def test_several_pictures_equal_diffusers_to_50_db(pipeline: Pipeline, sdxl: Model, sdxl_union: Model) -> None:
    wanted = expected(
        sdxl.checkpoint, sdxl_union.checkpoint, [picture(1), picture(2)], [3, 1],
        controlnet_conditioning_scale=[0.5, 0.9], control_guidance_end=[1.0, 0.5],
    )  # fmt: skip
    one, two = (
        Control(model="canny", image=picture(1), scale=0.5),
        Control(model="Depth", image=picture(2), scale=0.9, end=0.5),
    )
    assert psnr(drawn(pipeline, controls=[one, two], **SIZE), wanted) >= 50
    assert psnr(drawn(pipeline, controls=[one], **SIZE), wanted) < 45
    assert psnr(drawn(pipeline, controls=[two], **SIZE), wanted) < 45


def test_guess_mode_equals_diffusers_to_50_db(pipeline: Pipeline, sdxl: Model, sdxl_union: Model) -> None:
    """Without guidance: with it, diffusers gives such a ControlNet kinds for two rows and one row of latents."""
    alone: dict[str, Any] = {"guidance_scale": 1.0}
    wanted = expected(
        sdxl.checkpoint, sdxl_union.checkpoint, [picture(1)], [1], controlnet_conditioning_scale=0.8, guess_mode=True,
        **alone,
    )  # fmt: skip
    control = Control(model="Depth", image=picture(1), scale=0.8, guess=True)
    assert psnr(drawn(pipeline, controls=[control], **SIZE, **alone), wanted) >= 50


def test_its_pictures_share_one_run(pipeline: Pipeline) -> None:
    session = pipeline._controlnets.session(pipeline._controlnets.named["any"].key)
    run, pictures = session.run, []

    def watched(sizes: Any) -> None:
        pictures.append((sizes["rows"], sizes["pictures"]))
        run(sizes)

    session.run = watched  # type: ignore[method-assign]
    controls = [
        Control(model="canny", image=picture(1), end=0.5),
        Control(model="Depth", image=picture(2), start=0.25, end=0.75),
    ]
    try:
        pipeline("a", controls=controls, num_inference_steps=4, scheduler="ddim", guidance_scale=2.0, **SIZE)
    finally:
        session.run = run  # type: ignore[method-assign]
    assert pictures == [(2, 2)] * 3  # and none in the last step, where both are over


def test_kinds_have_names_and_numbers() -> None:
    assert [mode_number(name, 8) for name in ("openpose", "depth", "softedge", "LineArt", "normal", "seg", "tile")] == [
        *range(7)
    ]
    assert mode_number("repaint", 8) == mode_number(7, 8) == MODES["inpaint"]
    for mode in ("tile", 6, "edges", -1):
        with pytest.raises(
            InputError, match=r"takes pictures of 6 kinds, and '?\S+ is none of them; name the control by"
        ):
            mode_number(mode, 6)


def test_what_it_cannot_take_gets_one_line(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="pictures of 6 kinds, and 'any' is none of them"):
        pipeline("a", controls=[Control(model="any", image=picture(1))], **SIZE)
    mixed = [Control(model="canny", image=picture(1), guess=True), Control(model="Depth", image=picture(1))]
    with pytest.raises(InputError, match=r"takes its pictures together; give guess to all of them or to none"):
        pipeline("a", controls=mixed, **SIZE)
    with pytest.raises(InputError, match=r"a control's mode=1\.5 is no name and no number"):
        Control(model="any", mode=1.5)  # type: ignore[arg-type]
