"""Text, a picture or a part of one to pictures: prompt, embeddings, denoising loop, pixels."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.runtime.adapters.lora import Lora, merge
from calotype.runtime.arguments import at_least, pair, prompts, seeds, whole
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import CACHING
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.denoising.acceleration import Acceleration, FeatureCache, chosen
from calotype.runtime.denoising.denoiser import INT8, Denoiser, Job, unet_networks
from calotype.runtime.denoising.guidance import Guidance, guidances, scale_embedding
from calotype.runtime.denoising.start import Posterior, Start
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.pictures.autoencoder import Tiles, Vae
from calotype.runtime.pictures.canvas import Canvas, Picture
from calotype.runtime.pictures.masks import latent_mask
from calotype.runtime.schedulers import Solver, create_solver
from calotype.runtime.sessions import Session, check_backend, choose_backend, has_int8, open_session
from calotype.runtime.sessions.low_memory import Turn, TurnTakingSession
from calotype.runtime.sessions.profiled import Profile
from calotype.runtime.text.encoders import Conditioner, Inputs, TextEncoder
from calotype.runtime.text.syntax import warn_of_syntax
from calotype.runtime.text.textual_inversion import Embedding, add_embeddings
from calotype.runtime.text.tokenizer import ClipTokenizer

Array = NDArray[np.float32]
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


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
        steps: of the whole schedule, of which a picture to start from saves some.
        int8: whether the UNet was evaluated in int8.
        timings: seconds for ``text_encoder``, ``vae_encoder``, ``denoising``, ``vae_decoder``, ``total``, and a list
            ``steps``, of each step of the pictures that share the UNet's runs.
    """

    images: list[Any]
    seeds: list[int]
    steps: int
    int8: bool
    timings: dict[str, Any]


class Pipeline:
    """A bundle, opened on a backend."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        *,
        low_memory: bool = False,
        loras: Sequence[Lora] = (),
        embeddings: Sequence[Embedding] = (),
        vae: str | Path | None = None,
        vae_tiles: Tiles | None = None,
        fast: bool | Acceleration = False,
        profile: Profile | None = None,
    ) -> None:
        manifest = bundle.manifest
        encoders = [name for name in TEXT_ENCODERS if name == "text_encoder" or manifest.family == "sdxl"]
        missing = sorted({*encoders, "unet", "vae_decoder"} - manifest.networks.keys())
        if missing:
            raise BundleError(f"{bundle.path} has no {', '.join(missing)}; export the bundle again")
        self.manifest = manifest
        self.backend = choose_backend(backend, bundle.path)
        self._bundle = bundle
        self._turn = Turn() if low_memory else None
        self._profile = profile
        self._encoders, self._embeddings = encoders, embeddings
        self._sessions: dict[str, Session] = {}
        self._denoiser = Denoiser(self._sessions)
        self._changed: frozenset[str] = frozenset()
        self._loras, self._fast = loras, chosen(fast)
        self._check_caching(self._fast)
        overrides = self._merged(loras)

        def autoencoder() -> Bundle:
            return bundle if vae is None else Bundle.open(vae, weights=False)

        with ThreadPoolExecutor() as pool:
            opened = pool.submit(lambda: Vae(autoencoder(), self._opened, vae_tiles, manifest.vae.scaling_factor))
            self._open((*encoders, *self._unet_networks(self._fast)), overrides)
            self._vae = opened.result()
        self._vae.check_fits(manifest.vae)
        self._unet_inputs = {spec.name: spec for spec in manifest.networks["unet"].inputs}
        # How many channels of its sample are not the latents.
        self._context = int(self._unet_inputs["sample"].shape[1]) - manifest.vae.latent_channels
        if self._context not in (0, manifest.vae.latent_channels + 1):
            raise BundleError(f"{bundle.path} has a UNet with {self._context} extra channels; inpainting models have 5")

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path = "talbot",
        backend: str = "auto",
        *,
        low_memory: bool = False,
        loras: Sequence[Lora] = (),
        embeddings: Sequence[Embedding] = (),
        vae: str | Path | None = None,
        vae_tiles: Tiles | None = None,
        fast: bool | Acceleration = False,
        profile: Profile | None = None,
    ) -> Self:
        """Open a bundled model by name, or a bundle by folder.

        Args:
            name_or_folder: the bundle.
            backend: a name in ``BACKENDS``, or ``"auto"``.
            low_memory: keep the network that runs alone in memory.
            loras: see :meth:`set_loras`.
            embeddings: words of textual inversion that prompts may use.
            vae: a bundle whose autoencoder takes the place of the model's own, such as a tiny one.
            vae_tiles: work on large pictures in tiles; None is whole.
            fast: what calls do that say nothing of it, and which of the UNet's graphs are opened here. Exact, or
                True for the preset ``FAST``, or settings of one's own; see
                :class:`calotype.runtime.denoising.acceleration.Acceleration`.
            profile: is told where the time goes; complete when the pipeline is closed.

        Raises:
            BundleError: it is missing, corrupt, or of a format or family this version does not run.
            BackendError: the backend is unknown or cannot run here.
            InputError: a LoRA, an embedding or the other autoencoder does not fit the model.
        """
        check_backend(backend)
        return cls(
            Bundle.open(name_or_folder, weights=False),
            backend,
            low_memory=low_memory,
            loras=loras,
            embeddings=embeddings,
            vae=vae,
            vae_tiles=vae_tiles,
            fast=fast,
            profile=profile,
        )

    @property
    def engines(self) -> dict[str, Path | None]:
        """By open network of the UNet and the text encoders: the plan of the CPU backend that runs it, None without."""
        return {name: getattr(session, "engine", None) for name, session in self._sessions.items()}

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Open the networks that change again, with ``loras`` merged in place of those before; none restores the model.

        Raises:
            InputError: a file cannot be read, or does not fit the model; the pipeline is as it was.
        """
        overrides = self._merged(loras)
        changing = [name for name in self._sessions if _weights_of(name) in self._changed | overrides.keys()]
        for name in changing:
            self._sessions.pop(name).close()
        self._loras = loras
        self._open(changing, overrides)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        image: Picture | None = None,
        mask_image: Picture | None = None,
        strength: float | None = None,
        feather: int = 0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        scheduler: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        fast: bool | Acceleration | None = None,
        clip_skip: int = 0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        latents: Array | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Output:
        """Draw.

        Args:
            prompt: one, or several; see :mod:`calotype.runtime.text.prompts` for weights and length.
            negative_prompt: what to steer away from; one for all, or one for each prompt.
            image: a picture to start from, or its file. Scaled to cover the size asked for and cropped evenly.
            mask_image: of the picture's size; what is at least half white is drawn, the rest comes back exactly.
            strength: 0..1, how much noise is added to the picture: at 0 it only goes through the autoencoder, at 1 it
                is ignored. ``int(steps * strength)`` steps are run. None is 0.8, and 1 with a mask.
            feather: pixels inside the mask over which what is drawn fades into the picture.
            height: pixels, a multiple of the autoencoder's downscale; None is the picture's own size, rounded down, or
                without one the model's.
            width: likewise.
            num_inference_steps: 1 or more; None is the model's default.
            timesteps: training timesteps to visit, falling, instead of the scheduler's own choice.
            sigmas: noise levels to visit, falling, likewise.
            scheduler: a name in ``SCHEDULERS``; None is the checkpoint's own.
            scheduler_config: settings that take the place of those in the checkpoint's ``scheduler_config.json``.
            guidance_scale: one, or one for each image; see
                :class:`calotype.runtime.denoising.guidance.Guidance`. A UNet that
                takes the scale as an input (LCM) is given it, and runs one row.
            guidance_rescale: 0..1, likewise.
            guidance_interval: two noise levels, likewise.
            fast: draw accelerated; None is as the pipeline was loaded. A call that needs other graphs of the UNet than
                were opened then opens them, beside the ones that are.
            clip_skip: how many of the text encoder's last layers are left out. AUTOMATIC1111 counts from 1.
            original_size: SDXL's (height, width) before scaling; None is the picture's own.
            crops_coords_top_left: SDXL's (top, left); None is (0, 0).
            target_size: SDXL's (height, width); None is the picture's own.
            num_images_per_prompt: 1 or more.
            seed: 0..2⁶⁴-1; image k of the call is the image of seed + k alone. None picks one at random.
            latents: (N, C, height/f, width/f) of unit variance to start from instead of the seeds' noise.
            output_type: ``"pil"``, ``"np"`` or ``"latent"``.
            callback_on_step_end: called after every step of every image; returning False stops the run. Images that
                share the UNet's runs, in TensorRT's plans and small ones on a CPU, take each step together.

        Raises:
            InputError: an argument is out of range, or does not fit the model.
        """
        start = time.perf_counter()
        if output_type not in ("pil", "np", "latent"):
            raise InputError(f"output_type={output_type!r} is not known; valid: pil, np, latent")
        texts, negatives = prompts(prompt, negative_prompt, num_images_per_prompt)
        warn_of_syntax([*texts, *negatives])
        defaults = self.manifest.defaults
        canvas = Canvas.open(
            self.manifest,
            height=height,
            width=width,
            image=image,
            mask_image=mask_image,
            strength=strength,
            feather=feather,
        )
        acceleration = self._fast if fast is None else chosen(fast)
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        interval = acceleration.guidance_interval if guidance_interval is None else guidance_interval
        guided = guidances(scale, guidance_rescale, interval, len(texts))
        solver = self._solver(scheduler, scheduler_config, num_inference_steps, timesteps, sigmas, acceleration)
        given = seeds(seed, len(texts))
        shape = self._latent_shape(canvas)
        if latents is not None and latents.shape != (len(texts), *shape):
            raise InputError(f"latents have the shape {latents.shape}; {(len(texts), *shape)} is needed")
        common = self._size_conditioning(canvas, original_size, crops_coords_top_left, target_size)
        index = self._first_evaluation(canvas, solver)
        int8 = self._open_for(acceleration)

        inputs = [
            self._inputs(text, negative, self._layers_to_skip(clip_skip), guidance, common)
            for text, negative, guidance in zip(texts, negatives, guided, strict=True)
        ]
        after_text = time.perf_counter()
        begin = self._start(canvas, solver, index)
        after_encoder = time.perf_counter()
        jobs = []
        for number, (conditional, unconditional) in enumerate(inputs):
            rng = np.random.Generator(np.random.Philox(given[number]))
            noise = rng.standard_normal(shape, np.float32) if latents is None else latents[number].astype(np.float32)
            jobs.append(
                Job(
                    conditional=conditional,
                    unconditional=unconditional,
                    guidance=guided[number],
                    solver=solver,
                    state=solver.new_state(shape),
                    cache=self._cache(acceleration, shape, rows=1 if unconditional is None else 2),
                    int8=int8,
                    **begin.job(noise, rng),
                )
            )
        step_times = self._denoise(jobs, callback_on_step_end)
        after_loop = time.perf_counter()
        done = [number for number, job in enumerate(jobs) if job.done]
        finished = [jobs[number].latents for number in done]
        images = finished if output_type == "latent" else self._draw(finished, canvas, output_type)
        end = time.perf_counter()
        return Output(
            images=list(images),
            seeds=[given[number] for number in done],
            steps=solver.num_inference_steps,
            int8=int8,
            timings={
                "text_encoder": after_text - start,
                "vae_encoder": after_encoder - after_text,
                "denoising": after_loop - after_encoder,
                "vae_decoder": end - after_loop,
                "total": end - start,
                "steps": step_times,
            },
        )

    def close(self) -> None:
        """Give all memory back; the pipeline cannot be used any more."""
        for session in self._sessions.values():
            session.close()
        self._vae.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, networks: Sequence[str], overrides: Mapping[str, Mapping[str, Array]]) -> None:
        """Open ``networks``, and what is built on them."""

        def opened(name: str) -> Session:
            turns = name != "unet_shallow"  # small, and every second step would send the rest away
            return self._opened(self._bundle, name, overrides.get(_weights_of(name)), turns=turns)

        with ThreadPoolExecutor() as pool:
            self._sessions |= zip(networks, pool.map(opened, networks), strict=True)
        self._changed = frozenset(overrides)
        if set(networks) & set(self._encoders):  # else what they have encoded is still true
            self._conditioner = Conditioner(
                [self._text_encoder(name) for name in self._encoders],
                force_zeros_for_empty_prompt=self.manifest.force_zeros_for_empty_prompt,
            )

    def _open_for(self, acceleration: Acceleration) -> bool:
        """Open the graphs of the UNet that a call needs and that are not open; returns whether it is in int8."""
        self._check_caching(acceleration)
        networks = self._unet_networks(acceleration)
        missing = [name for name in networks if name not in self._sessions]
        if missing:
            self._open(missing, self._merged(self._loras))
        return networks == (INT8,)

    def _unet_networks(self, acceleration: Acceleration) -> tuple[str, ...]:
        """The sessions that a call needs; raises InputError where int8 is asked for and cannot be."""
        if acceleration.precision == "int8" and self._loras:
            raise InputError("an engine in int8 takes no LoRA: its weights were rounded when it was built; use float32")
        int8 = acceleration.precision == "int8" or (
            acceleration.precision is None
            and not acceleration.caches
            and not self._loras
            and has_int8(self._bundle.path, self.manifest.networks["unet"], self.backend)
        )
        return unet_networks(caching=acceleration.caches, int8=int8)

    def _check_caching(self, acceleration: Acceleration) -> None:
        missing = sorted(set(unet_networks(caching=acceleration.caches)) - self.manifest.networks.keys())
        if missing:
            raise BundleError(
                f"{self._bundle.path} has no {', '.join(missing)}, which deep-feature caching takes; "
                "export the bundle again"
            )

    def _cache(self, acceleration: Acceleration, shape: tuple[int, ...], rows: int) -> FeatureCache | None:
        """A job's, for latents of ``shape``."""
        if not acceleration.caches:
            return None
        spec = self.manifest.networks["unet_shallow"].input("deep_feature")
        assert spec is not None
        sizes = {"rows": rows, "height": shape[1], "width": shape[2]}
        return FeatureCache(acceleration.cache_interval, spec.resolve(sizes))

    def _opened(
        self,
        bundle: Bundle,
        network: str,
        overrides: Mapping[str, Array] | None = None,
        *,
        turns: bool = True,
    ) -> Session:
        profile, int8 = self._profile, network == INT8
        spec = bundle.manifest.networks["unet" if int8 else network]

        def opener() -> Session:
            check = functools.partial(bundle.check_weights, spec)
            precision, watched = "int8" if int8 else "float32", profile is not None
            return open_session(bundle.path, spec, self.backend, overrides, check, precision=precision, profile=watched)

        def watched() -> Session:
            return opener() if profile is None else profile.open(network, opener)

        return watched() if self._turn is None or not turns else TurnTakingSession(spec, watched, self._turn)

    def _merged(self, loras: Sequence[Lora]) -> dict[str, dict[str, Array]]:
        """The weights that ``loras`` change, by network and name."""
        if not loras:
            return {}
        networks = (*self._encoders, "unet")
        return merge(loras, {name: self._weights(name) for name in networks})

    def _weights(self, network: str) -> SafetensorsFile:
        spec = self.manifest.networks[network]
        self._bundle.check_weights(spec)
        return SafetensorsFile(self._bundle.path / spec.weights[0])

    def _text_encoder(self, name: str) -> TextEncoder:
        tokenizer, session = self._tokenizer(TEXT_ENCODERS[name]), self._sessions[name]
        if not self._embeddings:
            return TextEncoder(tokenizer, session)
        spec = self.manifest.networks[name].input("extra_embeddings")
        if spec is None:
            raise BundleError(f"{self._bundle.path} has a {name} that takes no embeddings; export the bundle again")
        vocabulary = self._weights(name).shape(TOKEN_TABLE)[0]
        return TextEncoder(
            tokenizer, session, add_embeddings(self._embeddings, name, tokenizer, vocabulary, int(spec.shape[1]))
        )

    def _tokenizer(self, name: str) -> ClipTokenizer:
        spec = self.manifest.tokenizers.get(name)
        if spec is None:
            raise BundleError(f"{self._bundle.path} has no {name}; export the bundle again")
        return ClipTokenizer.from_files(self._bundle.path / spec.vocab, self._bundle.path / spec.merges, spec)

    def _solver(
        self,
        scheduler: str | None,
        config: Mapping[str, Any] | None,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        acceleration: Acceleration,
    ) -> Solver:
        defaults = self.manifest.defaults
        if steps is None and timesteps is None and sigmas is None:
            steps = max(1, round(defaults.num_inference_steps * acceleration.steps))
        settings = {**self.manifest.scheduler, **(config or {})}
        if settings.get("sigma_spacing") == "ays":
            settings["sigma_spacing"] = "ays-sdxl" if self.manifest.family == "sdxl" else "ays-sd1"
        return create_solver(
            defaults.scheduler if scheduler is None else scheduler,
            settings,
            None if steps is None else whole("num_inference_steps", steps),
            timesteps=timesteps,
            sigmas=sigmas,
        )

    def _layers_to_skip(self, clip_skip: int) -> int:
        if at_least("clip_skip", clip_skip, 0) > self.manifest.max_clip_skip:
            raise InputError(
                f"clip_skip={clip_skip} is more than the {self.manifest.max_clip_skip} layers that "
                f"{self.manifest.name} can leave out; use fewer, or export the bundle again if it is an old one"
            )
        return clip_skip

    def _inputs(
        self, prompt: str, negative: str, clip_skip: int, guidance: Guidance, common: Inputs
    ) -> tuple[Inputs, Inputs | None]:
        """The UNet's inputs with and without the prompt; the latter None where guidance never needs them."""
        embedded = self._unet_inputs.get("timestep_cond")
        if embedded is not None:
            common = {**common, "timestep_cond": scale_embedding(guidance.scale, int(embedded.shape[1]))}
        wanted = negative if guidance.scale > 1 and embedded is None else None
        conditional, unconditional = self._conditioner.encode(prompt, wanted, clip_skip)
        return {**conditional, **common}, None if unconditional is None else {**unconditional, **common}

    def _size_conditioning(self, canvas: Canvas, original: Any, crop: Any, target: Any) -> Inputs:
        """SDXL's six numbers; Podell et al. 2023 (arXiv 2307.01952), section 2.2."""
        named = (("original_size", original, 1), ("crops_coords_top_left", crop, 0), ("target_size", target, 1))
        if "time_ids" not in self._unet_inputs:
            for name, value, _ in named:
                if value is not None:
                    raise InputError(f"{name} is for SDXL models; {self.manifest.name} is {self.manifest.family}")
            return {}
        size = (canvas.height, canvas.width)
        usual = {"original_size": size, "crops_coords_top_left": (0, 0), "target_size": size}
        pairs = [usual[name] if value is None else pair(name, value, low) for name, value, low in named]
        return {"time_ids": np.array(pairs, np.float32).reshape(-1)}

    def _first_evaluation(self, canvas: Canvas, solver: Solver) -> int:
        if self._context > 0 and canvas.mask is None:
            raise InputError(f"{self.manifest.name} is an inpainting model; give image and mask_image")
        index = 0 if canvas.picture is None else solver.start_index(canvas.strength)
        if index == len(solver) and canvas.strength > 0:
            steps = solver.num_inference_steps
            raise InputError(f"strength={canvas.strength:g} leaves no step of {steps}; use more of either")
        return index

    def _start(self, canvas: Canvas, solver: Solver, index: int) -> Start:
        vae = self.manifest.vae
        if canvas.picture is None:
            return Start(solver=solver, scale=self._vae.scale)
        inside = canvas.mask is not None and self._context == 0
        return Start(
            solver=solver,
            scale=self._vae.scale,
            index=index,
            picture=self._encode(canvas.pixels()) if index > 0 or inside else None,
            mask=None if canvas.mask is None else latent_mask(canvas.mask, vae.downscale),
            surroundings=self._encode(canvas.pixels(masked=True)) if self._context > 0 else None,
        )

    def _denoise(self, jobs: list[Job], callback: Callback | None) -> list[float]:
        batches = self._denoiser.batches(jobs)
        for batch in batches:
            self._denoiser.reserve(*batch)
        times, numbers = [], {job: number for number, job in enumerate(jobs)}
        for batch in batches:
            first = batch[0].index
            while not batch[0].done:
                before = time.perf_counter()
                self._denoiser.step(*batch)
                times.append(time.perf_counter() - before)
                if callback is None:
                    continue
                for job in batch:
                    steps = len(job.solver) - first
                    end = StepEnd(image=numbers[job], step=job.index - first, steps=steps, latents=job.latents)
                    if callback(end) is False:
                        return times
        return times

    def _encode(self, pixels: Array) -> Posterior:
        """Pixels (3, H, W) in -1..1 to latents."""
        mean, logvar = self._vae.encode(pixels)
        return Posterior(mean=mean, logvar=logvar)

    def _draw(self, latents: list[Array], canvas: Canvas, output_type: str) -> list[Any]:
        units = map(canvas.finish, self._vae.decode_all(latents))
        if output_type == "np":
            return list(units)
        return [Image.fromarray((unit * 255).round().astype(np.uint8)) for unit in units]

    def _latent_shape(self, canvas: Canvas) -> tuple[int, int, int]:
        vae = self.manifest.vae
        return vae.latent_channels, canvas.height // vae.downscale, canvas.width // vae.downscale


def _weights_of(network: str) -> str:
    """The network whose weights ``network`` reads."""
    return "unet" if network in CACHING else network
