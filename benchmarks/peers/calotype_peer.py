"""Calotype as a peer: ``python -m benchmarks.peers.calotype_peer``, spoken to as ``protocol`` says.

The mode ``built`` opens the engines that ``calotype build --backend cpu`` has made, and nothing else; ``int8`` has the
UNet's in int8, and ``fast`` is that at the share of the steps that ``--fast`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.peers.protocol import Array, Made, Task, serve


class Calotype:
    """A bundle on the CPU."""

    def __init__(self, model: str, mode: str) -> None:
        from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
        from calotype.runtime.pipeline import Pipeline

        int8 = Acceleration(precision="int8", steps=FAST.steps if mode == "fast" else 1)
        self._acceleration = int8 if mode in ("int8", "fast") else EXACT
        self._pipeline = Pipeline.load(model, "cpu", fast=self._acceleration)
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
            num_inference_steps=max(1, round(task.steps * self._acceleration.steps)),
            guidance_scale=task.guidance_scale,
            num_images_per_prompt=task.images,
            scheduler="euler",
            scheduler_config={"timestep_spacing": "linspace"},
            latents=latents,
            seed=task.seed,
        )
        return Made(
            pictures=np.stack([np.asarray(image) for image in output.images]),
            steps=list(output.timings.runs),
            stages={name: getattr(output.timings, name) for name in ("text_encoder", "denoising", "vae_decoder")},
        )


def imports() -> Mapping[str, str]:
    """Calotype and what runs its graphs."""
    import importlib.metadata

    import onnxruntime

    import calotype.runtime.pipeline  # noqa: F401

    return {"calotype": importlib.metadata.version("calotype"), "onnxruntime": onnxruntime.__version__}


if __name__ == "__main__":
    serve(Calotype, imports)
