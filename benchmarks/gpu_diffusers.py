"""diffusers in float16 on a GPU, as it comes and compiled, in turns with Calotype on CUDA.

Both draw the same prompt from the same latents by the same method in as many steps, guided, with the same weights. It
is the diffusers, and the PyTorch, that are installed beside Calotype.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.noise import normal
from benchmarks.subject import SEED, STEPS, WARM_UP, NotRunError, Parts, Subject
from benchmarks.timing import in_turns, ratios, spread
from calotype.runtime.diagnostics.benchmark import PROMPT
from calotype.runtime.pipeline import Pipeline

SCALE = 7.5
# How the networks are called, by the name of the part.
FORMS: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {"mode": "reduce-overhead"}}
Picture = NDArray[np.uint8]


class DiffusersParts:
    """Of a model whose checkpoint is a Stable Diffusion 1 or 2."""

    def __init__(self, subject: Subject, device: str = "cuda") -> None:
        self.subject, self.device = subject, device
        self.steps = subject.steps or STEPS[subject.model]

    def all(self) -> Parts:
        """By name."""
        return {"ready": self.ready, **{name: lambda how=how: self.beside(how) for name, how in FORMS.items()}}

    def ready(self) -> dict[str, Any]:
        """The pipeline of diffusers, float16 on a GPU, channels last."""
        if importlib.util.find_spec("diffusers") is None:
            raise NotRunError("diffusers is not installed")
        if self.subject.model not in ("talbot", "sd1"):
            raise NotRunError("it is compared at talbot's and Stable Diffusion 1.5's size")
        import diffusers
        import torch

        from benchmarks.checkpoints import model

        if self.device == "cuda" and not torch.cuda.is_available():
            raise NotRunError("this PyTorch has no CUDA")
        torch.backends.cudnn.benchmark = True
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32
        self.model = model(self.subject.model, self.subject.work)
        self.pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            self.model.checkpoint, torch_dtype=self.dtype, safety_checker=None, local_files_only=True
        ).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        for network in (self.pipeline.unet, self.pipeline.vae):
            network.to(memory_format=torch.channels_last)
        versions = {module.__name__: module.__version__ for module in (diffusers, torch)}
        return {"pixels": self.model.size, "steps": self.steps, "dtype": str(self.dtype), "versions": versions}

    def beside(self, how: dict[str, Any] | None) -> dict[str, Any]:
        """Milliseconds a picture of both, the ratios of turns, and how far the pictures are apart."""
        import torch

        from benchmarks.speed import psnr

        if how is not None:
            for network in (self.pipeline.unet, self.pipeline.vae.decoder):
                network.forward = torch.compile(network.forward, **how)
        with Pipeline.load(self.model.bundle, self.device) as ours:
            vae = ours.manifest.vae
            side = self.model.size // vae.downscale
            latents = normal(SEED, (vae.latent_channels, side, side))[None]
            calls = {"calotype": self._ours(ours, latents), "diffusers": self._theirs(latents)}
            first, pictures = {}, {}
            for name, call in calls.items():
                start = time.perf_counter()
                pictures[name] = call()
                first[name] = round(time.perf_counter() - start, 2)
                for _ in range(min(WARM_UP, self.subject.rounds)):
                    call()
            seconds, _ = in_turns(calls, self.subject.rounds, warm_up=0)
        return {
            "ratio": spread(ratios(seconds["diffusers"], seconds["calotype"]), 3),
            "picture_ms": {name: round(statistics.median(values) * 1e3, 3) for name, values in seconds.items()},
            "first_picture_s": first,
            "psnr_db": psnr(pictures["calotype"], pictures["diffusers"]),
        }

    def _ours(self, pipeline: Pipeline, latents: NDArray[np.float32]) -> Callable[[], Picture]:
        def draw() -> Picture:
            output = pipeline(
                PROMPT,
                negative_prompt="",
                num_inference_steps=self.steps,
                guidance_scale=SCALE,
                scheduler="euler",
                scheduler_config={"timestep_spacing": "linspace"},
                latents=latents,
            )
            return np.asarray(output.images[0])

        return draw

    def _theirs(self, latents: NDArray[np.float32]) -> Callable[[], Picture]:
        from benchmarks.peers.diffusers_peer import draw
        from benchmarks.peers.protocol import Task

        task = Task(
            prompt=PROMPT,
            negative_prompt="",
            height=self.model.size,
            width=self.model.size,
            steps=self.steps,
            guidance_scale=SCALE,
            images=1,
            seed=SEED,
            latents="",
            output="",
        )
        return lambda: draw(self.pipeline, task, latents, self.dtype).pictures[0]
