"""The bodies of AUTOMATIC1111's requests, and which of their fields mean something here.

A field that nothing here does is taken where its value asks for nothing, and refused by name where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from calotype.runtime.errors import quoted
from calotype.serving.errors import RequestRefusedError
from calotype.serving.webui.controlnet import SCRIPT


class Body(BaseModel):
    """What nobody knows is refused, so that no misspelt field passes in silence."""

    model_config = ConfigDict(extra="forbid")


class Drawing(Body):
    """What text to image and image to image share; None is the model's default."""

    prompt: str | None = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = 1
    n_iter: int | None = 1
    eta: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = True
    send_images: bool | None = True
    denoising_strength: float | None = None
    # Nothing is ever saved here, so these say what happens anyway.
    do_not_save_samples: bool | None = False
    do_not_save_grid: bool | None = False
    # The rest is refused where it asks for something: see NOTHING.
    save_images: bool | None = None
    styles: list[str] | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = None
    firstpass_image: str | None = None
    comments: dict[str, Any] | None = None
    script_name: str | None = None
    script_args: list[Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    infotext: str | None = None
    force_task_id: str | None = None


class TextToImage(Drawing):
    """The body of ``txt2img``."""

    enable_hr: bool | None = None
    # What a second pass would be like; without one they say nothing.
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None


class ImageToImage(Drawing):
    """The body of ``img2img``."""

    init_images: list[str] | None = None
    mask: str | None = None
    mask_blur: int | None = 4
    inpainting_fill: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: int | None = 0
    resize_mode: int | None = 0
    include_init_images: bool | None = False
    image_cfg_scale: float | None = None
    initial_noise_multiplier: float | None = None
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    mask_round: bool | None = None
    latent_mask: str | None = None


class PngInfo(Body):
    """The body of ``png-info``."""

    image: str


# By field: what asks for nothing, beside None; numbers that are the same are equal.
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "save_images": (False,),
    "styles": ([],),
    "subseed": (-1,),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None"),
    "disable_extra_networks": (False,),
    "firstpass_image": (),
    "comments": ({},),
    "script_name": ("", "None"),
    "script_args": ([],),
    "infotext": ("",),
    "force_task_id": ("",),
    "enable_hr": (False,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1,),
    "mask_blur_x": (4,),
    "mask_blur_y": (4,),
    "mask_round": (True,),
    "latent_mask": (),
}
VALID: Mapping[str, tuple[Any, ...]] = {
    "resize_mode": (0, 1),
    "inpainting_fill": (0, 1),
    "inpainting_mask_invert": (0, 1),
}
# What its own extensions are told to stay off.
OFF: tuple[list[Any], ...] = ([], [False])


def check(body: Drawing) -> None:
    """Raises RequestRefusedError, with the field's name, where something is asked for that nothing here does."""
    for name, valid in NOTHING.items():
        value = getattr(body, name, None)
        if value is not None and value not in valid:
            shown = " or ".join(map(repr, valid)) or "null"
            raise RequestRefusedError(
                f"{name}={quoted(value)} is not supported here; leave it out, or give {shown}", param=name
            )
    for name, valid in VALID.items():
        value = getattr(body, name, None)
        if value is not None and value not in valid:
            shown = ", ".join(map(str, valid))
            raise RequestRefusedError(f"{name}={quoted(value)} is not supported here; valid: {shown}", param=name)
    for script, value in (body.alwayson_scripts or {}).items():
        if script.lower() == SCRIPT:
            continue
        if not isinstance(value, Mapping) or value.get("args", []) not in OFF:
            raise RequestRefusedError(
                f"there is no script {quoted(script)} here; leave it out of alwayson_scripts", param="alwayson_scripts"
            )
