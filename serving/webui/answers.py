"""What AUTOMATIC1111's clients read of an answer: pictures with their infotexts, models, options, settings."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.embedded import Graph, settings_in
from calotype.runtime.pictures.parameters import parse_parameters
from calotype.runtime.version import __version__
from calotype.serving.http.images import decoded
from calotype.serving.service import ModelState
from calotype.serving.tasks import Drawn
from calotype.serving.webui.fields import Drawing, ImageToImage
from calotype.serving.webui.pictures import encoded
from calotype.serving.webui.requests import CHECKPOINT, CLIP_SKIP, Pictures, title

# What nothing here has any of.
NOTHING_THERE: Mapping[str, Any] = {
    "embeddings": {"loaded": {}, "skipped": {}},
    "extensions": [],
    "face-restorers": [],
    "hypernetworks": [],
    "latent-upscale-modes": [],
    "prompt-styles": [],
    "realesrgan-models": [],
    "script-info": [],
    "sd-vae": [],
    "upscalers": [],
}
# What it can be asked for and is not done here.
NOT_HERE = (
    "cmd-flags",
    "create/embedding",
    "create/hypernetwork",
    "extra-batch-images",
    "extra-single-image",
    "interrogate",
    "memory",
    "refresh-loras",
    "refresh-vae",
    "reload-checkpoint",
    "server-kill",
    "server-restart",
    "server-stop",
    "train/embedding",
    "train/hypernetwork",
    "unload-checkpoint",
)


def result(
    body: Drawing, asked: Pictures, model: ModelState, drawn: Sequence[tuple[int, Drawn]], began: float
) -> dict[str, Any]:
    """The answer to ``txt2img`` and ``img2img``.

    Args:
        body: as it was sent.
        asked: what was made of it.
        model: what drew.
        drawn: the pictures by their number; those that were interrupted before they began are missing.
        began: when, in seconds since 1970.
    """
    images = []
    for _, own in drawn if body.send_images is not False else ():
        pixels = own.pixels if asked.over is None else asked.over.finished(own.pixels)
        images.append(encoded(pixels, own.parameters))
    sent = body.model_dump(mode="json")
    if isinstance(body, ImageToImage) and not body.include_init_images:
        sent |= {"init_images": None, "mask": None}
    return {"images": images, "parameters": sent, "info": json.dumps(_info(body, asked, model, drawn, began))}


def _info(
    body: Drawing, asked: Pictures, model: ModelState, drawn: Sequence[tuple[int, Drawn]], began: float
) -> dict[str, Any]:
    numbers = [number for number, _ in drawn] or [0]
    requests = [asked.requests[number] for number in numbers]
    first = requests[0]
    # Every default is filled in where it was drawn.
    known = drawn[0][1].request if drawn else first.to_json()
    seeds = [request.seed for request in requests]
    return {
        "prompt": first.prompt,
        "all_prompts": [request.prompt for request in requests],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [request.negative_prompt for request in requests],
        "seed": first.seed,
        "all_seeds": seeds,
        "subseed": first.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": known.get("width"),
        "height": known.get("height"),
        "sampler_name": body.sampler_name or body.sampler_index or known.get("scheduler"),
        "cfg_scale": known.get("guidance_scale"),
        "steps": known.get("num_inference_steps"),
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": model.digest,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [own.parameters for _, own in drawn],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(began)),
        "clip_skip": first.clip_skip + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"calotype {__version__}",
    }


def png_info(image: str) -> dict[str, Any]:
    """The answer to ``png-info``, empty where a picture carries no settings; raises RequestRefusedError."""
    try:
        text = settings_in(decoded(image, "image"), "the picture")
    except InputError:
        return {"info": "", "items": {}, "parameters": {}}
    if isinstance(text, Graph):
        return {"info": text.text, "items": {"prompt": text.text}, "parameters": {}}
    found = parse_parameters(text)
    labelled = {
        "Prompt": found.prompt,
        "Negative prompt": found.negative_prompt,
        "Steps": found.steps,
        "Sampler": found.sampler,
        "CFG scale": found.guidance_scale,
        "Seed": found.seed,
        "Size-1": found.width,
        "Size-2": found.height,
        "Model hash": found.model_hash,
        "Model": found.model,
        **found.further,
        "Version": found.version,
    }
    parameters = {name: str(value) for name, value in labelled.items() if value is not None}
    return {"info": text, "items": {"parameters": text}, "parameters": parameters}


def options(model: ModelState) -> dict[str, Any]:
    """The answer to ``options``: what is so, whether it can be set or not."""
    return {
        CHECKPOINT: title(model),
        "sd_checkpoint_hash": sha256(model),
        CLIP_SKIP: 1,
        "samples_format": "png",
        "samples_save": False,
        "grid_save": False,
        "return_grid": False,
        "show_progress_every_n_steps": -1,
    }


def listed(model: ModelState) -> dict[str, Any]:
    """A model in the answer to ``sd-models``; no path is told."""
    return {
        "title": title(model),
        "model_name": model.name,
        "hash": model.digest,
        "sha256": sha256(model),
        "filename": model.name,
        "config": None,
    }


def sha256(model: ModelState) -> str | None:
    """The whole of what the digest is the beginning of."""
    files = model.manifest.files.values()
    return next((file.sha256 for file in files if file.sha256.startswith(model.digest)), None)
