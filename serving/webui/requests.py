"""From a body of AUTOMATIC1111's to the pictures that it asks for."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from calotype.runtime.adapters.named import NamedLora
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.families import family_of
from calotype.runtime.request import Request
from calotype.runtime.schedulers import create_solver
from calotype.serving.errors import RequestRefusedError
from calotype.serving.http.limits import Limits
from calotype.serving.service import ModelState
from calotype.serving.webui.controlnet import controls_of, units_of
from calotype.serving.webui.fields import Drawing, ImageToImage
from calotype.serving.webui.pictures import Over, opened, prepared
from calotype.serving.webui.samplers import NOISY, SAMPLERS, sampling

# What a request may set for itself, and every client for its next ones.
CHECKPOINT, CLIP_SKIP = "sd_model_checkpoint", "CLIP_stop_at_last_layers"
LORA = re.compile(r"<lora:([^:>]+)(?::([^:>]*))?>")
SEEDS = 2**32
# Our names of fields, and theirs.
NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "clip_skip": CLIP_SKIP,
    "strength": "denoising_strength",
    "feather": "mask_blur",
    "size": "width",
    **{name: name for name in ("prompt", "negative_prompt", "seed", "width", "height")},
}
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """All pictures of a body.

    Attributes:
        requests: one each, with seeds that follow each other.
        over: what they are drawn over; None is a blank page.
    """

    requests: Sequence[Request]
    over: Over | None = None


def pictures_of(body: Drawing, model: ModelState, limits: Limits) -> Pictures:
    """Read a body whose fields were checked. It decodes pictures, so it belongs in a thread.

    Args:
        body: of ``txt2img`` or ``img2img``.
        model: what draws.
        limits: the server's.

    Raises:
        RequestRefusedError: a value is out of range, or the model cannot do it.
    """
    prompt, loras = _without_loras(body.prompt or "", model)
    scheduler, config = _scheduling(body, model)
    defaults = model.manifest.defaults
    width = defaults.width if body.width is None else body.width
    height = defaults.height if body.height is None else body.height
    fields: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": body.negative_prompt or "",
        "width": width,
        "height": height,
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "scheduler": scheduler,
        "scheduler_config": config,
        "clip_skip": _clip_skip(body.override_settings or {}),
        "loras": tuple(loras) if loras else None,
    }
    over = None
    number = (body.n_iter or 1) * (body.batch_size or 1)
    for name in ("n_iter", "batch_size"):
        if getattr(body, name) is not None and getattr(body, name) < 1:
            raise RequestRefusedError(f"{name}={getattr(body, name)} is less than 1; use 1 or more", param=name)
    for side in (width, height):
        if side < 1:
            raise RequestRefusedError(f"{width}x{height} is no size; give whole numbers above 0", param="width")
    asked(lambda: limits.check_images(number, "batch_size"))
    asked(lambda: limits.check(Request(**fields), model.manifest))
    if isinstance(body, ImageToImage):
        over = _over(body, (width, height), limits)
        strength = body.denoising_strength
        fields |= {"image": over.image, "mask_image": over.mask, "strength": 0.75 if strength is None else strength}
        fields["feather"] = over.feather if over.mask is not None else 0
    units = units_of(body.alwayson_scripts)
    if units and over is not None and over.box is not None:
        line = "with ControlNet the whole picture is drawn; give inpaint_full_res=false"
        raise RequestRefusedError(line, param="inpaint_full_res")
    fields["controls"] = controls_of(units, model, (width, height), limits, pictured=over is not None)
    asked(lambda: limits.check(Request(**fields), model.manifest))
    first = secrets.randbelow(SEEDS) if body.seed in (None, -1) else body.seed
    assert first is not None
    requests = asked(lambda: [Request(**fields, seed=first + index) for index in range(number)])
    return Pictures(requests=requests, over=over)


def checkpoint(value: Any, models: Mapping[str, ModelState]) -> str:
    """The name of the model that is called by its title, name or hash; raises RequestRefusedError."""
    for name, model in models.items():
        if value in (title(model), name, model.digest):
            return name
    valid = ", ".join(models)
    raise RequestRefusedError(f"there is no model {quoted(value)}; valid: {valid}", param=CHECKPOINT)


def title(model: ModelState) -> str:
    """The name that people see there: with the hash behind it."""
    return f"{model.name} [{model.digest}]"


def _scheduling(body: Drawing, model: ModelState) -> tuple[str | None, dict[str, Any]]:
    """Our scheduler and its settings; None is the model's own, where nobody names one."""
    sampler = body.sampler_name or body.sampler_index
    if sampler is None:
        if (body.scheduler or "automatic").lower() != "automatic":
            raise RequestRefusedError("scheduler is of a sampler; give sampler_name too", param="scheduler")
        name, config = None, dict[str, Any]()
    else:
        name, config = sampling(sampler, body.scheduler, model.manifest.family)
    config |= _eta(body.eta, name)
    steps = model.manifest.defaults.num_inference_steps if body.steps is None else body.steps
    try:
        family, defaults = family_of(model.manifest.family), model.manifest.defaults
        # Of the model's own size: what a size changes in a schedule, it does not make possible or impossible.
        area = defaults.height * defaults.width // model.manifest.vae.downscale**2
        settings = family.solver_settings({**model.manifest.scheduler, **config}, area, steps)
        create_solver(name, settings, steps, flow=family.flow)
    except InputError as error:
        field = "steps" if "num_inference_steps" in str(error) else "scheduler" if config else "sampler_name"
        raise RequestRefusedError(str(error).replace("num_inference_steps", "steps"), param=field) from error
    return name, config


def _eta(eta: float | None, scheduler: str | None) -> dict[str, Any]:
    """How much noise a step adds, where the sampler leaves a choice; the others ignore it there, too."""
    if eta is None or scheduler is None:
        return {}
    if scheduler == "ddim":
        return {"eta": eta}
    if scheduler in NOISY and eta != 1:
        name = next(name for name, (own, _) in SAMPLERS.items() if own == scheduler)
        raise RequestRefusedError(f"eta={quoted(eta)} is not supported with {name}; leave it out", param="eta")
    return {}


def _clip_skip(settings: Mapping[str, Any]) -> int:
    """How many of the text encoder's last layers are left out; they count from 1."""
    unknown = sorted(settings.keys() - {CHECKPOINT, CLIP_SKIP})
    if unknown:
        raise RequestRefusedError(
            f"override_settings has {quoted(unknown[0])}, which nothing here does; valid: {CHECKPOINT}, {CLIP_SKIP}",
            param="override_settings",
        )
    value = settings.get(CLIP_SKIP, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 0 <= value <= 100:
        raise RequestRefusedError(f"{CLIP_SKIP}={quoted(value)} is no whole number from 1", param="override_settings")
    return max(int(value) - 1, 0)


def _over(body: ImageToImage, size: tuple[int, int], limits: Limits) -> Over:
    images = body.init_images or []
    if len(images) != 1:
        raise RequestRefusedError(f"init_images has {len(images)} pictures; give one", param="init_images")
    for name, most in (("mask_blur", 64), ("inpaint_full_res_padding", 4096)):
        value = getattr(body, name) or 0
        if not 0 <= value <= most:
            raise RequestRefusedError(f"{name}={value} is outside 0..{most}", param=name)
    image = opened(images[0], "init_images", limits)
    mask = None if not body.mask else opened(body.mask, "mask", limits, mask=True)
    part = body.inpaint_full_res if body.inpaint_full_res is not None else True
    return prepared(
        image,
        mask,
        size,
        resize_mode=body.resize_mode or 0,
        invert=bool(body.inpainting_mask_invert),
        fill=body.inpainting_fill or 0,
        feather=body.mask_blur or 0,
        padding=(body.inpaint_full_res_padding or 0) if part else None,
    )


def _without_loras(prompt: str, model: ModelState) -> tuple[str, list[NamedLora]]:
    """The prompt without ``<lora:NAME:SCALE>``, and those; raises RequestRefusedError."""
    found = []
    for name, scale in LORA.findall(prompt):
        if name not in model.loras:
            valid = ", ".join(model.loras) or "none"
            raise RequestRefusedError(f"there is no LoRA {quoted(name)}; valid: {valid}", param="prompt")
        try:
            found.append(NamedLora(name=name, scale=float(scale or 1.0)))
        except ValueError:
            raise RequestRefusedError(
                f"the LoRA {quoted(name)} has a scale that is no number", param="prompt"
            ) from None
    return (LORA.sub("", prompt).strip() if found else prompt), found


def asked(made: Callable[[], Made]) -> Made:
    """What ``made`` gives; what it refuses is said with the names that the client has for things."""
    try:
        return made()
    except (InputError, RequestRefusedError) as error:
        text = str(error)
        ours = getattr(error, "param", None) or next((name for name in NAMES if text.startswith(name)), None)
        theirs = NAMES.get(ours or "", ours)
        raise RequestRefusedError(text.replace(ours, theirs, 1) if ours and theirs else text, param=theirs) from error
