"""Calotype as a peer: ``python -m benchmarks.peers.calotype_peer``, spoken to as ``protocol`` says.

The mode ``built`` opens the engines that ``calotype build --backend cpu`` has made, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Array, Made, Task, serve


class Calotype:
    """A bundle on the CPU."""

    def __init__(self, model: str, mode: str) -> None:
        from calotype.runtime.acceleration import EXACT, Acceleration
        from calotype.runtime.pipeline import Pipeline

        self._pipeline = Pipeline.load(model, "cpu", fast=Acceleration(precision="int8") if mode == "int8" else EXACT)
        engine = next(engine for name, engine in self._pipeline.engines.items() if name.startswith("unet"))
        if (engine is not None) != bool(mode):
            raise ValueError(f"the UNet's engine is {engine}, in the mode {mode!r}")

    def generate(self, task: Task, latents: Array) -> Made:
        """See :class:`Server`."""
        output = self._pipeline(
            task.prompt,
            negative_prompt=task.negative_prompt,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance_scale,
            num_images_per_prompt=task.images,
            scheduler="euler",
            scheduler_config={"timestep_spacing": "linspace"},
            latents=latents,
            seed=task.seed,
        )
        stages: dict[str, Any] = {**output.timings}
        return Made(
            pictures=np.stack([np.asarray(image) for image in output.images]),
            steps=stages.pop("steps"),
            stages={name: stages[name] for name in ("text_encoder", "denoising", "vae_decoder")},
        )


def imports() -> Mapping[str, str]:
    """Calotype and what runs its graphs."""
    import importlib.metadata

    import onnxruntime

    import calotype.runtime.pipeline  # noqa: F401

    return {"calotype": importlib.metadata.version("calotype"), "onnxruntime": onnxruntime.__version__}


if __name__ == "__main__":
    serve(Calotype, imports)
