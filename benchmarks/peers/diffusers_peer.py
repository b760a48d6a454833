"""diffusers as a peer. Modes: ``eager`` as it comes, and ``channels-last``, alone or with ``compile`` or ``bf16``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peers.protocol import Array, Made, Task, serve
from benchmarks.peers.stopwatch import Stopwatch


class Diffusers:
    """A checkpoint in diffusers' layout on the CPU."""

    def __init__(self, model: str, mode: str) -> None:
        import diffusers
        import torch

        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, safety_checker=None, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        if mode != "eager":
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        if mode == "compile":
            for network in (pipeline.unet, pipeline.vae.decoder):
                network.forward = torch.compile(network.forward)
        self._pipeline, self._dtype = pipeline, dtype

    def generate(self, task: Task, latents: Array) -> Made:
        """See :class:`Server`."""
        return draw(self._pipeline, task, latents, self._dtype)


def draw(pipeline: Any, task: Task, latents: Array, dtype: Any) -> Made:
    """One call of a pipeline of diffusers' own kind."""
    import torch

    watch = Stopwatch()

    def step_end(_pipeline: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        watch.step()
        return values

    with (
        torch.inference_mode(),
        watch.around(pipeline.text_encoder, "text_encoder"),
        watch.around(pipeline.unet, "unet"),
        watch.around(getattr(pipeline, "vae_decoder", None) or pipeline.vae.decoder, "vae_decoder"),
    ):
        pictures = pipeline(
            task.prompt,
            negative_prompt=task.negative_prompt,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance_scale,
            num_images_per_prompt=task.images,
            latents=torch.from_numpy(latents).to(pipeline.device, dtype),
            output_type="np",
            callback_on_step_end=step_end,
        ).images
    return Made(pictures=(pictures * 255).round().astype("uint8"), steps=watch.steps, stages=watch.stages)


def imports() -> Mapping[str, str]:
    """The pipeline's class loads what it needs."""
    import diffusers
    import torch
    import transformers

    diffusers.StableDiffusionPipeline  # noqa: B018  (imported when it is asked for)
    return {module.__name__: module.__version__ for module in (diffusers, torch, transformers)}


if __name__ == "__main__":
    serve(Diffusers, imports)
