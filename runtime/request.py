"""A request: everything that makes one picture, checked once, as Python values and as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from calotype.runtime import arguments
from calotype.runtime.adapters.lora import Lora
from calotype.runtime.adapters.named import Asked, NamedLora, asked_all
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.control import Control, checked_controls
from calotype.runtime.denoising.acceleration import EXACT, Acceleration, chosen
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.image_prompt import ImagePrompt, checked_image_prompts
from calotype.runtime.pictures.canvas import MAX_SIZE, default_strength
from calotype.runtime.pictures.reading import Source, picture_source, read_picture
from calotype.runtime.pictures.references import checked_references
from calotype.runtime.schedulers import model_scheduler, scheduler_name

PIXELS = ("image", "mask_image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One picture, as it is asked for. None is always the default, which :meth:`resolved` fills in.

    Attributes:
        prompt: see :mod:`calotype.runtime.text.prompts` for weights and length.
        negative_prompt: what to steer away from.
        seed: 0..2⁶⁴-1; the seed alone makes the same picture again. None picks one at random.
        height: pixels, a multiple of the autoencoder's downscale; None is the picture's own size, rounded down, or
            without a picture the first reference's, or the model's.
        width: pixels, likewise.
        num_inference_steps: 1 or more; None is the model's default.
        timesteps: training timesteps to visit, falling, instead of the scheduler's own choice.
        sigmas: noise levels to visit, falling, and last the one to reach.
        scheduler: a name in ``SCHEDULERS``; None is the checkpoint's own.
        scheduler_config: settings that take the place of those in the checkpoint's ``scheduler_config.json``.
        guidance_scale: how strictly the prompt is followed; off at 1. None is the model's default.
        guidance_rescale: 0..1, against overexposure.
        guidance_interval: noise levels (low, high] within which guidance is on; None is all of them.
        fast: how much less is computed than exactly; None is as the pipeline was loaded.
        clip_skip: how many of the text encoder's last layers are left out. AUTOMATIC1111 counts from 1.
        image: a picture to start from: a PIL image, an array (H, W, 3) of uint8 or of floats in 0..1, or a file. It is
            scaled to cover the size asked for, and cropped evenly.
        mask_image: of the picture's size; what is at least half white is drawn, the rest comes back exactly.
        strength: 0..1, how much of the picture is given up to noise; None is 0.8, and 1 with a mask.
        feather: pixels inside the mask over which what is drawn fades into the picture.
        original_size: SDXL's (height, width) before scaling; None is the picture's own.
        crops_coords_top_left: SDXL's (top, left); None is (0, 0).
        target_size: SDXL's (height, width); None is the picture's own.
        loras: what is merged into the weights; None is as the pipeline has them. Each is a
            :class:`calotype.runtime.adapters.lora.Lora`, or a file, a folder or a registered name, alone or with a
            scale in a pair; see :func:`calotype.runtime.adapters.named.asked`.
        controls: ControlNets with their pictures, added up.
        image_prompts: IP-Adapters with the pictures that they read beside the prompt, added up.
        references: pictures that a model which edits goes by, as FLUX.2 klein; the size is that of the first, where
            none is given.

    Raises:
        InputError: a value is of a wrong type or out of range. What the model decides is checked later.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    scheduler: str | None = None
    scheduler_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    fast: bool | Acceleration | None = None
    clip_skip: int = 0
    image: Source | None = None
    mask_image: Source | None = None
    strength: float | None = None
    feather: int = 0
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    loras: tuple[Asked, ...] | None = None
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    references: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is not dataclasses.MISSING:
                value = field.default
            elif value is None and field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
            elif field.name in _CHECKS:
                value = _CHECKS[field.name](field.name, value)
            object.__setattr__(self, field.name, value)
        if self.guidance_interval is not None:
            Guidance(scale=1.0, interval=self.guidance_interval)
        if self.image is None:
            feather = self.feather if self.feather > 0 else None
            for name, value in (("mask_image", self.mask_image), ("strength", self.strength), ("feather", feather)):
                if value is not None:
                    raise InputError(f"{name} is about a picture, and there is none; give image too")
        elif self.mask_image is None and self.feather > 0:
            raise InputError("feather is about a mask, and there is none; give mask_image too")
        if self.timesteps is not None and self.sigmas is not None:
            raise InputError("timesteps and sigmas were both given; give one of them")

    def resolved(self, manifest: Manifest, fast: bool | Acceleration = EXACT, loras: tuple[Asked, ...] = ()) -> Self:
        """Fill in every default of the model; only a size that a picture has stays None.

        Args:
            manifest: the model's.
            fast: what a request that says nothing of it gets.
            loras: likewise.
        """
        defaults = manifest.defaults
        acceleration = chosen(fast if self.fast is None else self.fast)
        steps = self.num_inference_steps
        listed = self.timesteps if self.timesteps is not None else self.sigmas
        if steps is None and listed is None:
            steps = max(1, round(defaults.num_inference_steps * acceleration.steps))
        elif steps is None and listed is not None:
            steps = len(listed) - (self.sigmas is not None)
        interval = acceleration.guidance_interval if self.guidance_interval is None else self.guidance_interval
        blank = self.image is None
        sized = blank and not self.references
        return dataclasses.replace(
            self,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
            height=defaults.height if self.height is None and sized else self.height,
            width=defaults.width if self.width is None and sized else self.width,
            num_inference_steps=steps,
            scheduler=_own_scheduler(manifest) if self.scheduler is None else self.scheduler,
            guidance_scale=defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            guidance_interval=interval,
            fast=dataclasses.replace(acceleration, steps=1.0, guidance_interval=None),
            strength=default_strength(self.mask_image) if self.strength is None and not blank else self.strength,
            loras=loras if self.loras is None else self.loras,
        )

    def to_json(self) -> dict[str, Any]:
        """What is not a default, as plain values; pictures as PNG in base64, files by their paths."""
        value: dict[str, Any] = {"prompt": self.prompt}
        for field in dataclasses.fields(self):
            own = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name != "prompt" and own is not None and own != default:
                value[field.name] = _plain(own)
        return value

    @classmethod
    def from_json(cls, value: Any, *, files: bool = False) -> Self:
        """The inverse of :meth:`to_json`.

        Args:
            value: parsed JSON.
            files: whether paths are followed: of pictures, LoRAs, ControlNets, IP-Adapters. A stranger's must not be.

        Raises:
            InputError: it is no object, or has an unknown or missing field, a wrong value, or a path.
        """
        if not isinstance(value, Mapping):
            kind = type(value).__name__
            raise InputError(f"a request is of type {kind}; give an object with fields such as prompt")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in value.keys() - known)
        if unknown:
            names = quoted(", ".join(unknown))
            raise InputError(f"a request has no field {names}; valid: {', '.join(sorted(known))}")
        if "prompt" not in value:
            raise InputError("a request needs a prompt; an empty string is one")
        fields = dict(value)
        for name in PIXELS:
            if fields.get(name) is not None:
                fields[name] = _picture(name, fields[name], files)
        if fields.get("references") is not None:
            fields["references"] = _references(fields["references"], files)
        if fields.get("loras") is not None:
            fields["loras"] = _loras(fields["loras"], files)
        if fields.get("controls") is not None:
            fields["controls"] = _controls(fields["controls"], files)
        if fields.get("image_prompts") is not None:
            fields["image_prompts"] = _image_prompts(fields["image_prompts"], files)
        if isinstance(fields.get("fast"), Mapping):
            fields["fast"] = _acceleration(fields["fast"])
        return cls(**fields)


def expand(
    prompt: Any,
    negative_prompt: Any = None,
    *,
    images: Any = None,
    guidance_scale: Any = None,
    seed: Any = None,
    **shared: Any,
) -> list[Request]:
    """The requests of a call: of ``images`` pictures for each prompt.

    Args:
        prompt: one, or several.
        negative_prompt: one for all, or one for each prompt.
        images: how many of each prompt; None is one.
        guidance_scale: one for all, or one for each picture.
        seed: of the first picture, the next has the next; None picks a random one.
        shared: what is the same for all of them.

    Raises:
        InputError: a value is of a wrong type or out of range, or a list has another length.
    """
    texts, negatives = arguments.prompts(prompt, negative_prompt, images)
    scales = arguments.each("guidance scales", guidance_scale, len(texts))
    found = []
    for text, negative, scale, own in zip(texts, negatives, scales, arguments.seeds(seed, len(texts)), strict=True):
        found.append(Request(prompt=text, negative_prompt=negative, guidance_scale=scale, seed=own, **shared))
    return found


def _own_scheduler(manifest: Manifest) -> str:
    """What a model is drawn with where nobody says."""
    own = manifest.defaults.scheduler
    return model_scheduler(manifest.scheduler) if own is None else scheduler_name(own)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Image.Image):
        png = io.BytesIO()
        value.save(png, format="PNG")
        return {"png": base64.b64encode(png.getvalue()).decode()}
    if isinstance(value, Path):
        return {"file": str(value)}
    if isinstance(value, Lora):
        return {"file": str(value.path), "scale": value.scale}
    if isinstance(value, NamedLora):
        return {"name": value.name, "scale": value.scale}
    if isinstance(value, Control | ImagePrompt):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _plain(own) for field, own in pairs if own != field.default}
    if isinstance(value, Acceleration):
        return {name: _plain(own) for name, own in dataclasses.asdict(value).items()}
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _file(name: str, value: Any, files: bool) -> Path:
    """The path in ``{"file": …}``, where paths are followed."""
    if not isinstance(value.get("file"), str):
        raise InputError(f"{name} has no file that is a text")
    if not files:
        raise InputError(f"{name} names a file, and files of a request are not opened here; send its content")
    return Path(value["file"])


def _picture(name: str, value: Any, files: bool) -> Source:
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in ("png", "file"):
        raise InputError(f'{name} is no picture; give {{"png": "…"}} in base64')
    if "file" in value:
        return _file(name, value, files)
    try:
        data = base64.b64decode(value["png"], validate=True)
    except (TypeError, ValueError):
        raise InputError(f"{name} is not base64; encode the bytes of a picture file") from None
    return read_picture(data, name)


def _references(value: Any, files: bool) -> tuple[Source, ...]:
    if not isinstance(value, list | tuple):
        raise InputError('references is no list; give [{"png": "…"}] in base64')
    return tuple(_picture(f"references[{number}]", item, files) for number, item in enumerate(value))


def _loras(value: Any, files: bool) -> tuple[Asked, ...]:
    kinds = (Mapping, Lora, NamedLora)
    if not isinstance(value, list | tuple) or not all(isinstance(item, kinds) for item in value):
        raise InputError('loras is no list; give [{"name": "style", "scale": 0.8}], or a file in place of the name')
    return tuple(_lora(item, files) if isinstance(item, Mapping) else item for item in value)


def _lora(value: Mapping[Any, Any], files: bool) -> Asked:
    scale = arguments.finite("a LoRA's scale", value.get("scale", 1.0))
    if value.keys() - {"file", "name", "scale"} or ("file" in value) == ("name" in value):
        raise InputError(f'loras has {quoted(value)}; give a "name" or a "file", and a "scale" or none')
    if "name" in value:
        return NamedLora(name=value["name"], scale=scale)
    return Lora(path=_file("loras", value, files), scale=scale)


def _controls(value: Any, files: bool) -> tuple[Control, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping | Control) for item in value):
        raise InputError('controls is no list; give [{"model": "canny", "image": {"png": "…"}, "scale": 0.8}]')
    return tuple(item if isinstance(item, Control) else _control(item, files) for item in value)


def _control(value: Mapping[str, Any], files: bool) -> Control:
    known = {field.name for field in dataclasses.fields(Control)}
    if not value.keys() <= known or "model" not in value:
        raise InputError(f"a control needs a model, and may have {', '.join(sorted(known - {'model'}))}; nothing else")
    fields = {**value, "model": _model("a control's model", value["model"], files)}
    if fields.get("image") is not None:
        fields["image"] = _picture("a control's image", fields["image"], files)
    return Control(**fields)


def _model(name: str, value: Any, files: bool) -> Any:
    """A name, or the path in ``{"file": …}``."""
    if isinstance(value, Path):
        raise InputError(f'{name} is a path; give {{"file": "…"}}')
    return _file(name, value, files) if isinstance(value, Mapping) else value


def _image_prompts(value: Any, files: bool) -> tuple[ImagePrompt, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping | ImagePrompt) for item in value):
        raise InputError('image_prompts is no list; give [{"model": "face", "images": [{"png": "…"}], "scale": 0.6}]')
    return tuple(item if isinstance(item, ImagePrompt) else _image_prompt(item, files) for item in value)


def _image_prompt(value: Mapping[str, Any], files: bool) -> ImagePrompt:
    if value.keys() - {"scale"} != {"model", "images"}:
        raise InputError("an image prompt needs a model and images, and may have a scale; nothing else")
    images, name = value["images"], "an image prompt's picture"
    if not isinstance(images, list | tuple):
        raise InputError('an image prompt\'s images is no list; give [{"png": "…"}]')
    model = _model("an image prompt's model", value["model"], files)
    return ImagePrompt(**{**value, "model": model, "images": tuple(_picture(name, image, files) for image in images)})


def _acceleration(value: Mapping[str, Any]) -> Acceleration:
    known = {field.name for field in dataclasses.fields(Acceleration)}
    if value.keys() - known:
        raise InputError(f"fast has fields that are not known; valid: true, false, or {', '.join(sorted(known))}")
    fields = dict(value)
    if fields.get("guidance_interval") is not None:
        fields["guidance_interval"] = arguments.levels("guidance_interval", fields["guidance_interval"])
    return Acceleration(**fields)


def _scheduler(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name}={quoted(value)} is not a text; give a scheduler's name")
    return scheduler_name(value)


def _settings(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name}={quoted(value)} is no mapping of settings, such as {{'eta': 0.5}}")
    return {key: _setting(f"the scheduler setting {quoted(key)}", own) for key, own in value.items()}


def _setting(name: str, value: Any) -> Any:
    """A plain value, or a tuple of such; what it may be is known to its scheduler."""
    if arguments.listed(value):
        if len(value) > arguments.MOST_NUMBERS or any(map(arguments.listed, value)):
            raise InputError(f"{name} is no list of at most {arguments.MOST_NUMBERS} values")
        return tuple(_setting(name, item) for item in value)
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | np.integer):
        return arguments.whole(name, value)
    return arguments.finite(name, value)


def _chosen(_: str, value: Any) -> bool | Acceleration:
    chosen(value)
    return value  # type: ignore[no-any-return]


_CHECKS: Mapping[str, Any] = {
    "prompt": arguments.prompt,
    "negative_prompt": arguments.prompt,
    "seed": arguments.seed,
    "height": arguments.whole,
    "width": arguments.whole,
    "num_inference_steps": arguments.whole,
    "timesteps": arguments.numbers,
    "sigmas": arguments.numbers,
    "scheduler": _scheduler,
    "scheduler_config": _settings,
    "guidance_scale": arguments.finite,
    "guidance_rescale": lambda name, value: arguments.within(name, value, 0, 1),
    "guidance_interval": arguments.levels,
    "fast": _chosen,
    "clip_skip": lambda name, value: arguments.at_least(name, value, 0),
    "image": picture_source,
    "mask_image": picture_source,
    "strength": lambda name, value: arguments.within(name, value, 0, 1),
    "feather": lambda name, value: arguments.between(name, value, 0, MAX_SIZE),
    "original_size": lambda name, value: arguments.pair(name, value, 1),
    "crops_coords_top_left": lambda name, value: arguments.pair(name, value, 0),
    "target_size": lambda name, value: arguments.pair(name, value, 1),
    "loras": asked_all,
    "controls": checked_controls,
    "image_prompts": checked_image_prompts,
    "references": checked_references,
}
