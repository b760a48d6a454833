"""What the peers' servers share: diffusers' pipeline, a request's fields, and the answer of OpenAI's images API."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

STEPS = 20  # where a request names none


def load(checkpoint: str) -> Any:
    """Diffusers' pipeline on the CPU, channels last, which is its faster way to run there."""
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        checkpoint, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def draw(pipeline: Any, bodies: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The answers to requests of one number of steps, drawn in one call."""
    import torch

    with torch.inference_mode():
        images = pipeline(
            [body["prompt"] for body in bodies],
            height=size,
            width=size,
            num_inference_steps=bodies[0].get("num_inference_steps", STEPS),
            generator=[torch.Generator().manual_seed(body.get("seed", 0)) for body in bodies],
        ).images
    return [answer(image) for image in images]


def answer(image: Any) -> dict[str, Any]:
    """A picture as the API has it."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    return {"created": 0, "data": [{"b64_json": base64.b64encode(data.getvalue()).decode()}]}
