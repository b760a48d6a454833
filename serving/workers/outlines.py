"""What a picture will take, read from its request alone, before any worker sees it."""

from __future__ import annotations

from calotype.runtime.bundle.manifest import CONTROLLED, Manifest
from calotype.runtime.denoising.acceleration import EXACT, Acceleration
from calotype.runtime.families import denoiser_of, family_of
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.request import Request
from calotype.runtime.schedulers import SCHEDULERS
from calotype.serving.workers.costs import Outline


def outline_of(model: str, manifest: Manifest, request: Request, fast: bool | Acceleration = EXACT) -> Outline:
    """What ``request`` takes of the model that is served as ``model``.

    Args:
        model: its name.
        manifest: its bundle's.
        request: one picture; a size that is its picture's own is read from that.
        fast: what requests get that say nothing of it.

    Raises:
        InputError: it does not fit the model, as far as that is seen without opening it.
    """
    resolved = request.resolved(manifest, fast)
    canvas = Canvas.open(manifest, resolved)
    family = family_of(manifest.family)
    denoiser_of(family, manifest, resolved)  # what it refuses, is refused here
    assert resolved.num_inference_steps is not None
    assert resolved.guidance_scale is not None
    steps = resolved.num_inference_steps
    if canvas.picture is not None:
        steps = min(int(steps * canvas.strength), steps)
    shown = family.context_channels(manifest) > 0  # to the network, beside the latents
    return Outline(
        model=model,
        area=(canvas.height // manifest.vae.downscale) * (canvas.width // manifest.vae.downscale),
        evaluations=steps * SCHEDULERS[str(resolved.scheduler)].evaluations_per_step,
        rows=2 if family.guided(manifest, resolved.guidance_scale) else 1,
        network=f"{CONTROLLED}+{len(resolved.controls)}" if resolved.controls else "",
        pictures=(0 if canvas.picture is None else 1 + shown) + len(canvas.references),
        weights=resolved.loras or (),
    )
