"""stable-diffusion.cpp as a peer, through its Python bindings. Modes: the type of its weights, ``f32`` or ``f16``.

It takes no latents, but makes the noise of :mod:`benchmarks.noise` from the seed, as the other peers are given it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Array, Made, Task, serve


class StableDiffusionCpp:
    """A checkpoint in diffusers' layout on the CPU."""

    def __init__(self, model: str, mode: str) -> None:
        import os

        from stable_diffusion_cpp import StableDiffusion

        self._model = StableDiffusion(
            model_path=model, wtype=mode, rng_type="cuda", vae_decode_only=True, n_threads=os.cpu_count(), verbose=False
        )

    def generate(self, task: Task, latents: Array) -> Made:
        """See :class:`Server`."""
        ends: list[float] = []

        def progress(_step: int, steps: int, _seconds: float) -> None:
            if steps == task.steps:  # loading and tiles are reported too
                ends.append(time.perf_counter())

        images: list[Any] = self._model.generate_image(
            task.prompt,
            negative_prompt=task.negative_prompt,
            height=task.height,
            width=task.width,
            sample_steps=task.steps,
            cfg_scale=task.guidance_scale,
            sample_method="euler",
            scheduler="discrete",
            seed=task.seed,
            batch_count=task.images,
            progress_callback=progress,
        )
        end = time.perf_counter()
        # The first step of a call begins with what is not told apart from it.
        return Made(
            pictures=np.stack([np.asarray(image.convert("RGB")) for image in images]),
            steps=np.diff(ends).tolist(),
            stages={"vae_decoder": end - ends[-1]} if task.images == 1 and ends else {},
        )


def imports() -> Mapping[str, str]:
    """The bindings, which carry the library."""
    import importlib.metadata

    import stable_diffusion_cpp  # noqa: F401

    name = "stable-diffusion-cpp-python"
    return {name: importlib.metadata.version(name)}


if __name__ == "__main__":
    serve(StableDiffusionCpp, imports)
