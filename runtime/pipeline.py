"""Text to image: prompt, embeddings, denoising loop, pixels."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.runtime.bundle import Bundle
from calotype.runtime.conditioning import Conditioner
from calotype.runtime.denoising import Denoiser, Job
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions import Session, choose_backend, open_session
from calotype.runtime.tokenizer import ClipTokenizer

Array = NDArray[np.float32]
SEEDS = 2**64


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEnd:
    """What a callback sees after a step: which image of the call, which step of how many, its latents (C, h, w)."""

    image: int
    step: int
    steps: int
    latents: Array


# Return False to stop the run; what is finished by then is returned.
Callback = Callable[[StepEnd], bool | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The pictures of a call, the seed of each, and where the time went.

    Attributes:
        images: PIL images, or arrays: (H, W, 3) in 0..1 for ``"np"``, (C, h, w) for ``"latent"``.
        seeds: one for each; the seed alone makes the same image again.
        timings: seconds for ``text_encoder``, ``denoising``, ``vae_decoder``, ``total``, and a list ``steps``.
    """

    images: list[Any]
    seeds: list[int]
    timings: dict[str, Any]


class Pipeline:
    """A bundle, opened on a backend."""

    def __init__(self, bundle: Bundle, backend: str) -> None:
        manifest = bundle.manifest
        missing = sorted({"text_encoder", "unet", "vae_decoder"} - manifest.networks.keys())
        if missing:
            raise BundleError(f"{bundle.path} has no {', '.join(missing)}; export the bundle again")
        if manifest.family == "sdxl":
            raise BundleError(f"{bundle.path} is an SDXL model, which this version does not run yet")
        self.manifest = manifest
        self.backend = choose_backend(backend)
        names = ("text_encoder", "unet", "vae_decoder")
        with ThreadPoolExecutor() as pool:
            sessions = pool.map(lambda name: open_session(bundle.path, manifest.networks[name], self.backend), names)
            self._sessions: dict[str, Session] = dict(zip(names, sessions, strict=True))
        spec = manifest.tokenizers["tokenizer"]
        tokenizer = ClipTokenizer.from_files(bundle.path / spec.vocab, bundle.path / spec.merges, spec)
        self._conditioner = Conditioner(tokenizer, self._sessions["text_encoder"])
        self._denoiser = Denoiser(self._sessions["unet"])

    @classmethod
    def load(cls, name_or_folder: str | Path = "talbot", backend: str = "auto") -> Self:
        """Open a bundled model by name, or a bundle by folder.

        Raises:
            BundleError: it is missing, corrupt, or of a format or family this version does not run.
            BackendError: the backend is unknown or cannot run here.
        """
        choose_backend(backend)
        return cls(Bundle.open(name_or_folder), backend)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        latents: Array | None = None,
        scheduler: str | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Output:
        """Draw.

        Args:
            prompt: one, or several.
            negative_prompt: what to steer away from; one for all, or one for each prompt.
            height: pixels, a multiple of the autoencoder's downscale; None is the model's own size.
            width: likewise.
            num_inference_steps: 1 or more; None is the model's default.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); off at 1 and below.
            num_images_per_prompt: 1 or more.
            seed: 0..2⁶⁴-1; image k of the call is the image of seed + k alone. None picks one at random.
            latents: (N, C, height/f, width/f) of unit variance to start from instead of the seeds' noise.
            scheduler: a name in ``SCHEDULERS``; None is the checkpoint's own.
            output_type: ``"pil"``, ``"np"`` or ``"latent"``.
            callback_on_step_end: called after every step of every image; returning False stops the run.

        Raises:
            InputError: an argument is out of range.
        """
        start = time.perf_counter()
        defaults = self.manifest.defaults
        prompts, negatives = _prompts(prompt, negative_prompt, num_images_per_prompt)
        shape = self._latent_shape(
            defaults.height if height is None else height, defaults.width if width is None else width
        )
        scale = _finite("guidance_scale", defaults.guidance_scale if guidance_scale is None else guidance_scale)
        if output_type not in ("pil", "np", "latent"):
            raise InputError(f"output_type={output_type!r} is not known; valid: pil, np, latent")
        solver = create_solver(
            defaults.scheduler if scheduler is None else scheduler,
            self.manifest.scheduler,
            _whole(
                "num_inference_steps",
                defaults.num_inference_steps if num_inference_steps is None else num_inference_steps,
            ),
        )
        seeds = _seeds(seed, len(prompts))
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise InputError(f"latents have the shape {latents.shape}; {(len(prompts), *shape)} is needed")

        encoded = [
            (self._conditioner.encode(text), self._conditioner.encode(negative) if scale > 1 else None)
            for text, negative in zip(prompts, negatives, strict=True)
        ]
        after_text = time.perf_counter()
        jobs = []
        for index, (conditional, unconditional) in enumerate(encoded):
            rng = np.random.Generator(np.random.Philox(seeds[index]))
            noise = rng.standard_normal(shape, np.float32) if latents is None else latents[index].astype(np.float32)
            noise *= np.float32(solver.init_noise_sigma)
            jobs.append(
                Job(
                    latents=noise,
                    conditional=conditional,
                    unconditional=unconditional,
                    guidance_scale=scale,
                    solver=solver,
                    state=solver.new_state(shape),
                    rng=rng,
                )
            )
        step_times = self._denoise(jobs, callback_on_step_end)
        after_loop = time.perf_counter()
        finished = [job.latents for job in jobs if job.done]
        images = finished if output_type == "latent" else [self._decode(item, output_type) for item in finished]
        end = time.perf_counter()
        return Output(
            images=list(images),
            seeds=seeds[: len(finished)],
            timings={
                "text_encoder": after_text - start,
                "denoising": after_loop - after_text,
                "vae_decoder": end - after_loop,
                "total": end - start,
                "steps": step_times,
            },
        )

    def close(self) -> None:
        """Give all memory back; the pipeline cannot be used any more."""
        for session in self._sessions.values():
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _denoise(self, jobs: list[Job], callback: Callback | None) -> list[float]:
        self._denoiser.reserve(jobs)
        times = []
        for number, job in enumerate(jobs):
            while not job.done:
                before = time.perf_counter()
                self._denoiser.step(job)
                times.append(time.perf_counter() - before)
                if callback is not None:
                    end = StepEnd(image=number, step=job.index, steps=len(job.solver), latents=job.latents)
                    if callback(end) is False:
                        return times
        return times

    def _decode(self, latents: Array, output_type: str) -> Any:
        """Latents (C, h, w) to a picture, each alone: see :meth:`Denoiser.step`."""
        session, vae = self._sessions["vae_decoder"], self.manifest.vae
        sizes = {"batch": 1, "height": latents.shape[1], "width": latents.shape[2]}
        session.reserve(sizes)
        session.buffer("latents", sizes)[0] = latents / vae.scaling_factor + vae.shift_factor
        session.run(sizes)
        pixels = session.buffer("image", sizes)[0].transpose(1, 2, 0)  # (H, W, 3)
        unit = np.clip(pixels / 2 + 0.5, 0, 1)
        return unit if output_type == "np" else Image.fromarray((unit * 255).round().astype(np.uint8))

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.manifest.vae.downscale
        # The UNet halves its latents once a level; sizes that do not divide still work, by its own rounding.
        for name, value in (("height", height), ("width", width)):
            _whole(name, value)
            if value < factor or value % factor:
                nearest = max(factor, round(value / factor) * factor)
                raise InputError(f"{name}={value} is not a positive multiple of {factor}; use {nearest}")
            if value > 16384:
                raise InputError(f"{name}={value} is more than 16384 pixels; use a smaller one")
        return self.manifest.vae.latent_channels, height // factor, width // factor


def _prompts(prompt: str | Sequence[str], negative: str | Sequence[str], images: int) -> tuple[list[str], list[str]]:
    _whole("num_images_per_prompt", images)
    if images < 1:
        raise InputError(f"num_images_per_prompt={images} is less than 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("there is no prompt; an empty string is one")
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    return [p for p in prompts for _ in range(images)], [n for n in negatives for _ in range(images)]


def _seeds(seed: int | None, count: int) -> list[int]:
    first = secrets.randbelow(2**32) if seed is None else _whole("seed", seed)
    if not 0 <= first <= SEEDS - count:
        raise InputError(f"seed={first} is outside 0..2**64-1 for {count} image(s)")
    return [first + index for index in range(count)]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name}={value!r} is not a whole number")
    return int(value)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not math.isfinite(value):
        raise InputError(f"{name}={value!r} is not a finite number")
    return float(value)
