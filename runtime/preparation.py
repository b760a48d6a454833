"""From a request to a job: everything that happens before a picture's first step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.form import Form
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.conditions import Conditioning, Conditions
from calotype.runtime.controlnets import ControlNets
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.denoising.feature_cache import SHALLOW, FeatureCache
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.denoising.start import Posterior, Start
from calotype.runtime.errors import InputError
from calotype.runtime.families import Family, denoiser_of
from calotype.runtime.families.base import Conditioner
from calotype.runtime.ip_adapters import IpAdapters
from calotype.runtime.loras import Loras, merged_into
from calotype.runtime.merged_weights import Weights
from calotype.runtime.networks import Networks
from calotype.runtime.pictures.autoencoder import Vae
from calotype.runtime.pictures.canvas import Canvas, to_pixels
from calotype.runtime.pictures.masks import latent_mask
from calotype.runtime.request import Request
from calotype.runtime.schedulers import Solver, create_solver
from calotype.runtime.sessions import Session
from calotype.runtime.text.syntax import prompt_warnings
from calotype.runtime.text.textual_inversion import Embedding
from calotype.runtime.text.vocabulary import read_words, unknown_words

MOST_POSTERIORS = 8  # of pictures to start from, kept encoded
MOST_SOLVERS = 32
MOST_ROWS = 8  # prompts' rows, which pictures of one prompt share
MOST_CONDITIONERS = 4  # text encoders with other weights, and what they have encoded
MOST_SAID = 256
FAR = 3.0  # times as many pixels as the model's own size has, or as few
logger = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")


@dataclasses.dataclass(kw_only=True, eq=False)
class Drawing(Job):
    """A job with what it takes to finish it.

    Attributes:
        request: the request, every default filled in.
        canvas: its size, and the picture and the mask that it started from.
        drawn_in: what the denoising network is computed in.
        picture_seconds: how long the picture that it starts from took to encode.
        controlnets: name and hash of what each of the request's controls is of.
        ip_adapters: name and hash of the IP-Adapter of each of its image prompts.
    """

    request: Request
    canvas: Canvas
    drawn_in: Form
    picture_seconds: float = 0.0
    controlnets: tuple[tuple[str, str], ...] = ()
    ip_adapters: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A request whose prompts are encoded; ``rows`` are the denoising network's with and without the prompt.

    ``ip_adapters`` are name and hash of the IP-Adapter of each of its image prompts, which are in the rows.
    """

    request: Request
    canvas: Canvas
    solver: Solver
    index: int
    form: Form
    rows: tuple[Inputs, Inputs | None]
    conditions: Conditions
    ip_adapters: tuple[tuple[str, str], ...]


class Preparation:
    """Turns requests into jobs. What pictures have in common is made once: solvers, encoded prompts and pictures."""

    def __init__(
        self,
        manifest: Manifest,
        family: Family,
        networks: Networks,
        vae: Vae,
        loras: Loras,
        controlnets: ControlNets,
        ip_adapters: IpAdapters,
        embeddings: Sequence[Embedding] = (),
    ) -> None:
        self._manifest, self._family, self._networks, self._vae = manifest, family, networks, vae
        self._loras, self._conditioning, self._embeddings = loras, Conditioning(controlnets), embeddings
        self._ip_adapters = ip_adapters
        self._conditioners: OrderedDict[tuple[int, ...], tuple[list[Session], Conditioner]] = OrderedDict()
        self._posteriors: OrderedDict[bytes, Posterior] = OrderedDict()
        self._solvers: OrderedDict[str, Solver] = OrderedDict()
        self._rows: OrderedDict[tuple[Any, ...], tuple[Inputs, Inputs | None]] = OrderedDict()
        self._conditioned(loras.default)  # with the model, so that no picture waits for it
        self._said: OrderedDict[str, None] = OrderedDict()
        path = manifest.words
        self._words = None if path is None else read_words(networks.bundle.path / path)

    def encode(self, request: Request, fast: Acceleration, canvas: Canvas | None = None) -> Encoded:
        """Check a request and encode its prompts; every other network is left alone.

        Args:
            request: what is asked for.
            fast: what a request that says nothing of it gets.
            canvas: the request's, where the caller has opened it for another request of the same pictures.

        Raises:
            InputError: it asks for what this model cannot do.
        """
        request = self._loras.resolved(request.resolved(self._manifest, fast, self._loras.default))
        canvas = Canvas.open(self._manifest, request) if canvas is None else canvas
        request = dataclasses.replace(request, height=canvas.height, width=canvas.width)
        solver = self._solver(request, canvas)
        index = self._first_evaluation(canvas, solver)
        assert isinstance(request.fast, Acceleration)
        for name in ("controls", "image_prompts"):
            if getattr(request, name) and request.fast.caches:
                raise InputError(f"cache_interval and {name} exclude each other; use one of them")
        conditions = self._conditioning.conditions(request.controls, canvas, range(index, len(solver)))
        images = self._ip_adapters.rows(request.image_prompts) if request.image_prompts else None
        form = self._form(request)
        rows = _kept(self._rows, _text_of(request), lambda: self._encoded(request, canvas), MOST_ROWS)
        if canvas.references:
            rows = self._with_references(rows, canvas)
        self._warn(request)  # of prompts that can be drawn: one that is refused gets one line
        return Encoded(
            request=request,
            canvas=canvas,
            solver=solver,
            index=index,
            form=form,
            rows=_with_images(rows, images),
            conditions=conditions,
            ip_adapters=tuple(self._ip_adapters.of(prompt.model).identity for prompt in request.image_prompts),
        )

    def _warn(self, request: Request) -> None:
        """Say in the log what is legal and unlikely to be what was meant, once for each prompt and size."""
        manifest = self._manifest
        said = [*prompt_warnings(request.prompt), *prompt_warnings(request.negative_prompt)]
        unknown = [] if self._words is None else unknown_words(request.prompt, self._words)
        if unknown:
            known = f"{manifest.name} was not taught these words, and what it draws for them is chance"
            said.append(f"{known}: {', '.join(unknown)}")
        own, asked = manifest.defaults, (request.height or 0) * (request.width or 0)
        if not 1 / FAR <= asked / (own.height * own.width) <= FAR:
            said.append(
                f"{request.width}x{request.height} is far from the {own.width}x{own.height} of {manifest.name} itself; "
                "expect repeated or broken shapes"
            )
        for line in said:
            if line not in self._said:
                self._said[line] = None
                logger.warning("%s", line)
        while len(self._said) > MOST_SAID:
            self._said.popitem(last=False)

    def encode_all(self, requests: Sequence[Request], fast: Acceleration) -> list[Encoded]:
        """Encode many requests, see :meth:`encode`; those with the same pictures share a canvas."""
        encoded: list[Encoded] = []
        for number, request in enumerate(requests):
            shared = number > 0 and _same_pictures(request, requests[number - 1])
            encoded.append(self.encode(request, fast, encoded[-1].canvas if shared else None))
        return encoded

    def checked_latents(self, latents: Any, encoded: Sequence[Encoded]) -> Sequence[Array | None]:
        """The latents that each of the requests starts from, None where they are drawn; raises InputError."""
        if latents is None or not encoded:
            return [None] * len(encoded)
        given = _numeric(latents)
        needed = (len(encoded), *self._family.latent_shape(self._manifest, encoded[0].canvas))
        if given.shape != needed:
            raise InputError(f"latents have the shape {given.shape}; {needed} is needed")
        return list(given)

    def job(self, encoded: Encoded, latents: Array | None = None) -> Drawing:
        """The job of a request whose prompts are encoded; ``latents`` (C, h, w) of unit variance replace its noise."""
        request, solver = encoded.request, encoded.solver
        shape = self._family.latent_shape(self._manifest, encoded.canvas)
        assert request.seed is not None
        assert request.guidance_scale is not None
        assert isinstance(request.fast, Acceleration)
        begin = time.perf_counter()
        start = self._start(encoded.canvas, solver, encoded.index)
        picture_seconds = time.perf_counter() - begin
        rng = np.random.Generator(np.random.Philox(request.seed))
        noise = rng.standard_normal(shape, np.float32) if latents is None else _given(latents, shape)
        own = start.begin(noise, rng)
        conditional, unconditional = encoded.rows
        network = denoiser_of(self._family, self._manifest, request)
        return Drawing(
            request=request,
            canvas=encoded.canvas,
            latents=own.latents,
            context=own.context,
            known=own.known,
            conditional=conditional,
            unconditional=unconditional,
            guidance=Guidance(
                scale=request.guidance_scale, rescale=request.guidance_rescale, interval=request.guidance_interval
            ),
            solver=solver,
            state=solver.new_state(shape),
            rng=rng,
            cache=self._cache(request.fast.cache_interval, shape, rows=1 if unconditional is None else 2),
            controls=encoded.conditions.controls,
            features=encoded.conditions.features,
            network=network,
            form=encoded.form,
            weights=self._networks.key(network, encoded.form, merged_into(request)).weights,
            index=encoded.index,
            drawn_in=encoded.form,
            picture_seconds=picture_seconds,
            controlnets=encoded.conditions.models,
            ip_adapters=encoded.ip_adapters,
        )

    def _encoded(self, request: Request, canvas: Canvas) -> tuple[Inputs, Inputs | None]:
        return self._family.rows(self._manifest, self._conditioned(merged_into(request)), request, canvas)

    def _with_references(self, rows: tuple[Inputs, Inputs | None], canvas: Canvas) -> tuple[Inputs, Inputs | None]:
        """Rows with and without the prompt, each with the reference pictures."""
        latents = [self._encode(to_pixels(picture)).mode(self._vae.scale) for picture in canvas.references]
        own = self._family.reference_rows(latents)
        conditional, unconditional = rows
        return {**conditional, **own}, None if unconditional is None else {**unconditional, **own}

    def _form(self, request: Request) -> Form:
        """What the denoising network is computed in; its sessions and the text encoders' are opened."""
        fast, loras = request.fast, merged_into(request)
        assert isinstance(fast, Acceleration)
        network = denoiser_of(self._family, self._manifest, request)
        if request.references and fast.caches:
            raise InputError("cache_interval and references exclude each other; use one of them")
        form = self._networks.form(network, fast.precision, whole=not fast.caches, loras=loras)
        denoising = self._networks.denoising(form, network=network, caching=fast.caches, loras=loras)
        self._networks.open([*self._networks.encoding(loras), *denoising])
        return form

    def _conditioned(self, loras: Weights) -> Conditioner:
        """The text encoders with these LoRAs, and what they have encoded, as long as their sessions are open."""
        sessions = {
            encoder.network: self._networks.encoder(encoder.network, loras) for encoder in self._family.encoders
        }

        def make() -> tuple[list[Session], Conditioner]:
            # With the sessions, whose identities stay theirs as long as they are held.
            conditioner = self._family.conditioner(self._networks.bundle, sessions.__getitem__, self._embeddings)
            return list(sessions.values()), conditioner

        return _kept(self._conditioners, tuple(map(id, sessions.values())), make, MOST_CONDITIONERS)[1]

    def _solver(self, request: Request, canvas: Canvas) -> Solver:
        settings = {**self._manifest.scheduler, **request.scheduler_config}
        _, height, width = self._family.latent_shape(self._manifest, canvas)
        assert request.num_inference_steps is not None
        create = functools.partial(
            create_solver,
            request.scheduler,
            self._family.solver_settings(settings, height * width, request.num_inference_steps),
            request.num_inference_steps,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            flow=self._family.flow,
        )
        key = json.dumps([create.args, create.keywords], default=str)
        return _kept(self._solvers, key, create, MOST_SOLVERS)

    def _first_evaluation(self, canvas: Canvas, solver: Solver) -> int:
        if self._family.context_channels(self._manifest) > 0 and canvas.mask is None:
            raise InputError(f"{self._manifest.name} is an inpainting model; give image and mask_image")
        index = 0 if canvas.picture is None else solver.start_index(canvas.strength)
        if index == len(solver) and canvas.strength > 0:
            steps = solver.num_inference_steps
            raise InputError(f"strength={canvas.strength:g} leaves no step of {steps}; use more of either")
        return index

    def _start(self, canvas: Canvas, solver: Solver, index: int) -> Start:
        if canvas.picture is None:
            return Start(solver=solver, scale=self._vae.scale)
        shown = self._family.context_channels(self._manifest) > 0
        inside = canvas.mask is not None and not shown
        return Start(
            solver=solver,
            scale=self._vae.scale,
            index=index,
            picture=self._encode(canvas.pixels()) if index > 0 or inside else None,
            mask=None if canvas.mask is None else latent_mask(canvas.mask, self._manifest.vae.downscale),
            surroundings=self._encode(canvas.pixels(masked=True)) if shown else None,
        )

    def _encode(self, pixels: Array) -> Posterior:
        """Pixels (3, H, W) in -1..1 to the posterior of their latents."""

        def encode() -> Posterior:
            mean, logvar = self._vae.encode(pixels)
            return Posterior(mean=mean, logvar=logvar)

        key = hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode()).digest()
        return _kept(self._posteriors, key, encode, MOST_POSTERIORS)

    def _cache(self, interval: int, shape: tuple[int, ...], rows: int) -> FeatureCache | None:
        """A job's kept feature, for latents of ``shape``."""
        if interval < 2:
            return None
        spec = self._manifest.networks[SHALLOW].input("deep_feature")
        assert spec is not None
        return FeatureCache(interval, spec.resolve({"rows": rows, "height": shape[1], "width": shape[2]}))


def _text_of(request: Request) -> tuple[Any, ...]:
    """All of a resolved request that its rows depend on."""
    names = ("prompt", "negative_prompt", "clip_skip", "guidance_scale", "height", "width", "loras")
    sizes = ("original_size", "crops_coords_top_left", "target_size")
    return tuple(getattr(request, name) for name in (*names, *sizes))


def _with_images(
    rows: tuple[Inputs, Inputs | None], images: tuple[Inputs, Inputs] | None
) -> tuple[Inputs, Inputs | None]:
    """Rows with and without the prompt, those of image prompts and of none added."""
    if images is None:
        return rows
    (conditional, unconditional), (shown, hidden) = rows, images
    return {**conditional, **shown}, None if unconditional is None else {**unconditional, **hidden}


def _same_pictures(request: Request, other: Request) -> bool:
    """Whether two requests have the same canvas."""
    pictures = [(request.image, other.image), (request.mask_image, other.mask_image)]
    names = ("height", "width", "strength", "feather")
    pictures += zip(request.references, other.references, strict=False)
    alike = len(request.references) == len(other.references)
    return (
        alike
        and all(one is two or (isinstance(one, Path) and one == two) for one, two in pictures)
        and all(getattr(request, name) == getattr(other, name) for name in names)
    )


def _numeric(latents: Any) -> np.ndarray[Any, Any]:
    """An array of real numbers; an empty one of what is none."""
    try:
        array = np.asarray(latents)
    except (TypeError, ValueError):
        return np.empty(0)
    return array if array.dtype.kind in "fiu" else np.empty(0)


def _given(latents: Any, shape: tuple[int, ...]) -> Array:
    """A copy of ``latents``, checked."""
    array = np.array(_numeric(latents), np.float32)
    if array.shape != shape:
        raise InputError(f"latents have the shape {array.shape}; {shape} is needed")
    if not np.isfinite(array).all():
        raise InputError("latents hold numbers that are not finite; give normal ones of unit variance")
    return array


def _kept(store: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """What ``make`` gives, kept by ``key`` among the ``most`` that were used last."""
    if key not in store:
        store[key] = make()
        if len(store) > most:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]
