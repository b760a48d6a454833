"""Text, a picture or a part of one to pictures: prompt, embeddings, denoising loop, pixels."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from calotype.runtime.adapters.named import Asked, asked_all
from calotype.runtime.arguments import (
    MOST_THREADS,
    as_path,
    as_paths,
    at_least,
    between,
    instance,
    instances,
    switch,
)
from calotype.runtime.arrays import Array
from calotype.runtime.bundle.folder import Bundle, check_kind
from calotype.runtime.bundle.manifest import SAFETY_CHECKER
from calotype.runtime.call import Call, Callback
from calotype.runtime.closing import Closing
from calotype.runtime.control import Control
from calotype.runtime.controlnets import ControlNets
from calotype.runtime.denoising.acceleration import Acceleration, chosen
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.job import Job, Key, SessionKey
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.families import family_of
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.ip_adapters import IpAdapters
from calotype.runtime.loras import Loras
from calotype.runtime.merged_weights import Weights
from calotype.runtime.networks import CONTROLNETS, LORA_MEMORY, Networks
from calotype.runtime.parallel import run_parallel
from calotype.runtime.picture import Kind, Model, Output, Picture, Settings
from calotype.runtime.pictures.autoencoder import Tiles, Vae
from calotype.runtime.pictures.reading import Source
from calotype.runtime.pictures.safety import SafetyChecker, check_has_checker
from calotype.runtime.preparation import Drawing, Encoded, Preparation
from calotype.runtime.request import Request, expand
from calotype.runtime.sessions import Session, check_backend
from calotype.runtime.sessions.traced import Trace
from calotype.runtime.text.textual_inversion import Embedding

WORDS = "[Embedding.read(path)]"
# A LoRA, a file, a folder or a registered name; or one of the latter and a scale.
LoraLike = Asked | str | Path | tuple[str | Path, float]


class Pipeline(Closing):
    """A model, opened on a backend.

    A call draws; so do :meth:`prepare`, :meth:`step` and :meth:`finish`, which the call is made of, with jobs that come
    and go. All may be called from several threads: each of them is done alone, and calls wait for each other. A process
    that is forked opens a pipeline of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        *,
        low_memory: bool = False,
        loras: Sequence[LoraLike] | None = None,
        lora_folder: str | Path | None = None,
        prompt_loras: bool = False,
        lora_memory: int = LORA_MEMORY,
        embeddings: Sequence[Embedding] | None = None,
        vae: str | Path | None = None,
        vae_tiles: Tiles | None = None,
        controls: Mapping[str, str | Path] | None = None,
        image_prompts: Mapping[str, str | Path] | None = None,
        safety_checker: bool = False,
        fast: bool | Acceleration = False,
        trace: Trace | None = None,
        threads: int | None = None,
        device: int | None = None,
    ) -> None:
        given, words = asked_all("loras", loras), instances("embeddings", embeddings, Embedding, WORDS)
        named, adapters = as_paths("controls", controls), as_paths("image_prompts", image_prompts)
        if vae_tiles is not None:
            instance("vae_tiles", vae_tiles, Tiles, "Tiles(size=64, overlap=16)")
        if trace is not None:
            instance("trace", trace, Trace, "Trace()")
        check_kind(bundle, "model")
        self.manifest, self._family = bundle.manifest, family_of(bundle.manifest.family)
        self._family.check(bundle.manifest)
        self._fast, self.low_memory = chosen(fast), switch("low_memory", low_memory)
        self._lock, self._calls = threading.RLock(), threading.RLock()
        self._process, self._closed = os.getpid(), False
        folder = None if lora_folder is None else as_path("lora_folder", lora_folder)
        self._loras = Loras(given, folder, instance("prompt_loras", prompt_loras, bool, "True or False"))
        encoders = [encoder.network for encoder in self._family.encoders]
        self.networks = Networks(
            bundle,
            backend,
            denoiser=self._family.denoiser,
            encoders=encoders,
            lora_memory=at_least("lora_memory", lora_memory, 0),
            low_memory=self.low_memory,
            trace=trace,
            threads=None if threads is None else between("threads", threads, 1, MOST_THREADS),
            device=None if device is None else at_least("device", device, 0),
        )
        self.backend = self.networks.backend
        other = None if vae is None else Bundle.open(vae, weights=False)
        if other is not None:
            check_kind(other, "vae", "model")
        extra = None if other is None else other.manifest
        self._model = Model.of(bundle.manifest, self._family.denoiser, words, extra, vae_tiles is not None)
        self._controlnets = ControlNets(self.networks, named)
        self._ip_adapters = IpAdapters(self.networks, adapters)
        self._checker: SafetyChecker | None = None
        if switch("safety_checker", safety_checker):
            check_has_checker(bundle)
            self._checker = SafetyChecker(self.networks.open_session(bundle, SAFETY_CHECKER))
        self._vae = self._opened(bundle if other is None else other, vae_tiles)
        self._denoiser = Denoiser(self._session)
        self._preparation = Preparation(
            self.manifest,
            self._family,
            self.networks,
            self._vae,
            self._loras,
            self._controlnets,
            self._ip_adapters,
            words,
        )

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path = "talbot",
        backend: str = "auto",
        *,
        low_memory: bool = False,
        loras: Sequence[LoraLike] | None = None,
        lora_folder: str | Path | None = None,
        prompt_loras: bool = False,
        lora_memory: int = LORA_MEMORY,
        embeddings: Sequence[Embedding] | None = None,
        vae: str | Path | None = None,
        vae_tiles: Tiles | None = None,
        controls: Mapping[str, str | Path] | None = None,
        image_prompts: Mapping[str, str | Path] | None = None,
        safety_checker: bool = False,
        fast: bool | Acceleration = False,
        trace: Trace | None = None,
        threads: int | None = None,
        device: int | None = None,
        sha256: str | None = None,
    ) -> Self:
        """Open a bundled model by name, or a bundle by folder.

        Args:
            name_or_folder: the bundle.
            backend: a name in ``BACKENDS``, or ``"auto"``.
            low_memory: keep the network that runs alone in memory.
            loras: see :meth:`set_loras`.
            lora_folder: whose LoRAs requests may name, files without their ``.safetensors`` and adapters' folders.
            prompt_loras: have ``<lora:NAME:SCALE>`` in a prompt name one of those; else it is read as words.
            lora_memory: bytes of merged weights that are kept for their LoRAs to come again, those that were used last;
                2 GiB where none is said. Those in use come on top. With an engine of the CPU a set takes its changed
                tensors in float32, 1.4 GB for every linear layer of SD 1.5; else all weights of what it changes.
            embeddings: words of textual inversion that prompts may use.
            vae: a bundle whose autoencoder takes the place of the model's own, such as a tiny one.
            vae_tiles: work on large pictures in tiles; None is whole.
            controls: folders of ControlNets' bundles, by the names that requests know them by; those are opened here,
                and the UNet that they add to in place of the one that requests without them take.
            image_prompts: folders of IP-Adapters' bundles, likewise.
            safety_checker: whether the model's own looks at every picture; one that it takes exception to is black, and
                ``flagged``.
            fast: what requests get that say nothing of it, and which of the denoising network's graphs are opened here.
                Exact, or True for the preset ``FAST``, or settings of one's own; see
                :class:`calotype.runtime.denoising.acceleration.Acceleration`.
            trace: is told where the time goes; complete when the pipeline is closed.
            threads: that the CPU backend computes with; None is ``CALOTYPE_THREADS``, ``OMP_NUM_THREADS``, or as many
                processors as this process may use.
            device: the number of the GPU, among those that ``CUDA_VISIBLE_DEVICES`` leaves; None is the first that the
                backend finds, or none.
            sha256: a pin: what the hash of the bundle's manifest has to be, and through it every file.

        Raises:
            BundleError: it is missing, corrupt, not the one that is pinned, or of a format or family this version does
                not run.
            BackendError: the backend is unknown or cannot run here.
            InputError: a LoRA, an embedding, a ControlNet, an IP-Adapter or the other autoencoder does not fit the
                model.
        """
        check_backend(backend)
        return cls(
            Bundle.open(name_or_folder, weights=False, sha256=sha256),
            backend,
            low_memory=low_memory,
            loras=loras,
            lora_folder=lora_folder,
            prompt_loras=prompt_loras,
            lora_memory=lora_memory,
            embeddings=embeddings,
            vae=vae,
            vae_tiles=vae_tiles,
            controls=controls,
            image_prompts=image_prompts,
            safety_checker=safety_checker,
            fast=fast,
            trace=trace,
            threads=threads,
            device=device,
        )

    @property
    def engines(self) -> dict[str, Path | None]:
        """By open network: the plan that runs it, None where it is the bundle's own graph."""
        return self.networks.engines

    @property
    def lora_names(self) -> tuple[str, ...]:
        """The LoRAs that requests may name; see ``lora_folder`` of :meth:`load`."""
        return tuple(self._loras.registered)

    def set_loras(self, loras: Sequence[LoraLike] | None) -> None:
        """Merge ``loras`` into the weights for requests that say nothing of them, in place of those before.

        Args:
            loras: each as in :class:`Request`; () and None are the model's own weights, bit for bit.

        Raises:
            InputError: a file cannot be read, or does not fit the model; the pipeline is as it was.
        """
        given = asked_all("loras", loras)
        with self._usable():
            files = self._loras.files(given)
            self._open(files)
            self._loras.default = files

    def is_open(self, job: Job) -> bool:
        """Whether the next run of ``job`` needs no network to be opened, which with other LoRAs can take seconds."""
        return job.key.session in self.networks.sessions

    def prepare(self, request: Request, *, latents: Array | None = None) -> Drawing:
        """Turn a request into a job: check it, encode its prompts and the picture it starts from, draw its noise.

        Args:
            request: the picture that is asked for.
            latents: (C, height/f, width/f) of unit variance to start from instead of the seed's noise.

        Raises:
            InputError: it asks for what this model cannot do.
        """
        instance("request", request, Request, "Request(prompt=…)")
        with self._usable():
            return self._preparation.job(self._preparation.encode(request, self._fast), latents)

    def step(self, jobs: Sequence[Job]) -> None:
        """Move each of ``jobs``, like or unlike, by one step, in as few runs as they may share; one that is done stays.

        An error leaves every job where it was, or an evaluation further, and each can be moved again.
        """
        with self._usable():
            self._denoiser.step(jobs)

    def finish(self, job: Drawing, output_type: Kind = "pil") -> Picture:
        """Decode a job that is done.

        Raises:
            InputError: it is not done.
            BackendError: what came out is not finite; the message says where that began.
        """
        instance("job", job, Job, "what prepare() made")
        return self.finish_all([job], output_type)[0]

    def encode_all(self, requests: Sequence[Request]) -> list[Encoded]:
        """Check many requests and encode their prompts, each network in one go; :meth:`start` makes jobs of them.

        Raises:
            InputError: one asks for what this model cannot do.
        """
        with self._usable():
            return self._preparation.encode_all(requests, self._fast)

    def checked_latents(self, latents: Any, encoded: Sequence[Encoded]) -> Sequence[Array | None]:
        """The latents (N, C, height/f, width/f) of so many requests, checked; None for each where there are none."""
        return self._preparation.checked_latents(latents, encoded)

    def start(self, encoded: Encoded, latents: Array | None = None) -> Drawing:
        """Make the job of a request whose prompts are encoded; see :meth:`prepare`."""
        with self._usable():
            return self._preparation.job(encoded, latents)

    def reserve(self, jobs: Sequence[Job]) -> None:
        """Allocate for the runs of ``jobs`` to come, so that none of them has to."""
        with self._usable():
            self._denoiser.reserve(jobs)

    def capacity(self, key: Key) -> int:
        """The most rows of one run of jobs of that key; opens its session, and merges its weights, where needed."""
        with self._usable():
            return self._denoiser.capacity(key)

    def padded(self, key: Key, rows: int) -> int:
        """The rows that a run of ``rows`` of that key really has; opens what :meth:`capacity` opens."""
        with self._usable():
            return self._denoiser.padded(key, rows)

    def advance(self, jobs: Sequence[Job]) -> set[Job]:
        """Make one run: of the first of ``jobs``, none of them done, and of those that may share it.

        Returns:
            The jobs of which that ended a step; a solver of second order takes two evaluations for one.
        """
        with self._usable():
            return self._denoiser.advance(jobs)

    def finish_all(self, jobs: Sequence[Drawing], output_type: Kind = "pil") -> list[Picture]:
        """Decode jobs that are done; those of one size share the decoder's runs that it lets. See :meth:`finish`."""
        for job in jobs:
            if not job.done:
                raise InputError(
                    f"a job at step {job.step} of {job.steps} is no picture yet; step() it until it is done"
                )
        images: list[Any] = [job.latents for job in jobs]
        if output_type != "latent":
            with self._usable():
                for numbers in _by_size(jobs):
                    decoded = self._vae.decode_all([jobs[number].latents for number in numbers])
                    for number, pixels in zip(numbers, decoded, strict=True):
                        images[number] = jobs[number].canvas.finish(pixels)
        for job, image in zip(jobs, images, strict=True):
            _check_finite(job, image)
        flagged = [None] * len(jobs) if output_type == "latent" else self._checked(images)
        if output_type == "pil":
            images = list(map(_image, images))
        return [
            Picture(
                image=image,
                settings=Settings(
                    request=job.request,
                    model=self._model,
                    form=job.drawn_in,
                    controlnets=job.controlnets,
                    ip_adapters=job.ip_adapters,
                ),
                flagged=own,
            )
            for job, image, own in zip(jobs, images, flagged, strict=True)
        ]

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Source | None = None,
        mask_image: Source | None = None,
        strength: float | None = None,
        feather: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        scheduler: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        guidance_scale: float | Sequence[float | None] | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        fast: bool | Acceleration | None = None,
        loras: Sequence[LoraLike] | None = None,
        clip_skip: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        controls: Sequence[Control] | None = None,
        image_prompts: Sequence[ImagePrompt] | None = None,
        references: Sequence[Source] | None = None,
        num_images_per_prompt: int | None = None,
        seed: int | None = None,
        latents: Array | None = None,
        output_type: Kind | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> Output:
        """Draw one picture or several.

        All arguments but these are those of :class:`calotype.runtime.request.Request`, for all pictures alike; None is
        always the default.

        Args:
            prompt: one, or several.
            negative_prompt: one for all, or one for each prompt.
            image: see :class:`Request`, as for all that is not named here.
            mask_image: see :class:`Request`.
            strength: see :class:`Request`.
            feather: see :class:`Request`.
            height: see :class:`Request`.
            width: see :class:`Request`.
            num_inference_steps: see :class:`Request`.
            timesteps: see :class:`Request`.
            sigmas: see :class:`Request`.
            scheduler: see :class:`Request`.
            scheduler_config: see :class:`Request`.
            guidance_scale: one for all, or one for each picture.
            guidance_rescale: see :class:`Request`.
            guidance_interval: see :class:`Request`.
            fast: see :class:`Request`.
            loras: see :class:`Request`; ``[("style.safetensors", 0.8)]``, say. Nothing of them stays after the call.
            clip_skip: see :class:`Request`.
            original_size: see :class:`Request`.
            crops_coords_top_left: see :class:`Request`.
            target_size: see :class:`Request`.
            controls: see :class:`Request`.
            image_prompts: see :class:`Request`.
            references: see :class:`Request`.
            num_images_per_prompt: 1 or more.
            seed: of the first picture; picture k of the call is the picture of seed + k alone. None picks a random one.
            latents: (N, C, height/f, width/f) of unit variance to start from instead of the seeds' noise.
            output_type: ``"pil"`` for images, ``"np"`` for (H, W, 3) in 0..1, ``"latent"`` for (C, h, w).
            callback_on_step_end: called after every step of every picture; returning False stops the run. Pictures that
                share runs take each step together.

        Raises:
            InputError: an argument is out of range, or does not fit the model.
        """
        requests = expand(
            prompt,
            negative_prompt,
            images=num_images_per_prompt,
            guidance_scale=guidance_scale,
            seed=seed,
            image=image,
            mask_image=mask_image,
            strength=strength,
            feather=feather,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            scheduler=scheduler,
            scheduler_config=scheduler_config,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            fast=fast,
            loras=loras,
            clip_skip=clip_skip,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            controls=controls,
            image_prompts=image_prompts,
            references=references,
        )
        kind: Kind = "pil" if output_type is None else output_type
        with self._calls:
            call = self.draw(requests, latents=latents, output_type=kind, callback=callback_on_step_end)
            drawn = dict(call)
        return Output(pictures=[drawn[number] for number in sorted(drawn)], timings=call.timings)

    def draw(
        self,
        requests: Sequence[Request],
        *,
        latents: Array | None = None,
        output_type: Kind = "pil",
        callback: Callback | None = None,
    ) -> Call:
        """Prepare ``requests``, like or unlike, and draw them while the result is iterated over; see :class:`Call`."""
        return Call(self, requests, latents=latents, kind=output_type, callback=callback)

    def trim(self) -> None:
        """Give back the memory that large pictures have taken, as a call does at its end.

        What the networks hold at sizes of up to 256 x 256 is kept, so that small pictures are drawn without delay.
        """
        with self._usable():
            self.networks.trim()
            self._controlnets.trim()
            self._ip_adapters.trim()
            if self._checker is not None:
                self._checker.trim()

    def close(self) -> None:
        """Give all memory back; may be called again, also while a call runs, which then ends with an error."""
        with self._lock:
            self._closed = True
            if self._process == os.getpid():  # the sessions of a parent are not this process's to close
                self.networks.close()
                self._controlnets.close()
                self._ip_adapters.close()
                self._vae.close()
                if self._checker is not None:
                    self._checker.close()

    def _opened(self, autoencoder: Bundle, tiles: Tiles | None) -> Vae:
        """Open the networks, what conditions them and the autoencoder, all at once; where one fails, all are closed."""
        opened: list[Vae] = []

        def open_vae() -> None:
            scale, opener = self.manifest.vae.scaling_factor, self.networks.open_session
            opened.append(Vae(autoencoder, opener, tiles, scale))

        def open_networks() -> None:
            self._open(self._loras.default)

        try:
            run_parallel(lambda work: work(), [open_vae, open_networks, self._controlnets.open, self._ip_adapters.open])
            (vae,) = opened
            vae.check_fits(self.manifest.vae)
        except BaseException:
            for own in opened:
                own.close()
            self._controlnets.close()
            self._ip_adapters.close()
            self.networks.close()
            if self._checker is not None:
                self._checker.close()
            raise
        return vae

    def _open(self, loras: Weights) -> None:
        """Open what requests need that have ``loras`` and say nothing of precision and caching."""
        networks, caching = self.networks, self._fast.caches
        controls, prompts = bool(self._controlnets.named), bool(self._ip_adapters.named)
        network = self._family.denoiser if caching else networks.entry(controls=controls, image_prompts=prompts)
        form = networks.form(network, self._fast.precision, whole=not caching, loras=loras)
        denoising = networks.denoising(form, network=network, caching=caching, loras=loras)
        networks.open([*networks.encoding(loras), *denoising])

    def _checked(self, images: Sequence[Array]) -> Sequence[bool | None]:
        """Whether the safety checker takes exception to each of ``images``, (H, W, 3) in 0..1, which is black then."""
        if self._checker is None:
            return [None] * len(images)
        with self._usable():
            flagged = self._checker.flagged(list(map(_image, images)))
        for image, black in zip(images, flagged, strict=True):
            if black:
                image[:] = 0
        return flagged

    def _session(self, key: SessionKey) -> Session:
        return (self._controlnets if key.network in CONTROLNETS else self.networks).session(key)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Hold the networks for one operation; raises BackendError where they are closed, or another process's."""
        if self._process != os.getpid():
            raise BackendError(
                "this pipeline was opened before the process was forked, and cannot draw in the child; load it after "
                'the fork, or start processes with multiprocessing.get_context("spawn")'
            )
        with self._lock:
            if self._closed:
                raise BackendError("the pipeline is closed; load it again")
            yield


def _image(pixels: Array) -> Image.Image:
    """Of (H, W, 3) in 0..1."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _check_finite(job: Drawing, image: Array) -> None:
    """Raises BackendError where numbers of a picture are not finite, and says where that began."""
    if np.isfinite(image).all() and np.isfinite(job.latents).all():
        return
    rows = [value for row in (job.conditional, job.unconditional or {}) for value in row.values()]
    if not all(np.isfinite(value).all() for value in rows):
        where = "the text encoder"
    elif not np.isfinite(job.latents).all():
        where = "the denoising loop"
    else:
        where = "the autoencoder's decoder"
    raise BackendError(
        f"the picture of seed {job.request.seed} has values that are not finite, from {where} on; use a smaller "
        "guidance scale or LoRA scale, or --precision float32, and check the model with: calotype verify"
    )


def _by_size(jobs: Sequence[Job]) -> list[list[int]]:
    """The numbers of jobs whose latents have one shape, for each shape."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        found.setdefault(job.latents.shape, []).append(number)
    return list(found.values())
