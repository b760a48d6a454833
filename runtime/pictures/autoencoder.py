"""The autoencoder: latents to pictures and back, whole or in tiles.

Kingma & Welling 2013 (arXiv 1312.6114); Rombach et al. 2022 (arXiv 2112.10752).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arguments import finite, instance, whole
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import VaeSpec
from calotype.runtime.closing import Closing
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.sessions import Session, check_backend, choose_backend, open_session

Array = NDArray[np.float32]
# Opens a network of a bundle.
Opener = Callable[[Bundle, str], Session]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Squares of latents that are worked on one by one, so that memory does not grow with the picture.

    Neighbours overlap, and fade into each other there. A tile sees nothing outside itself: its normalisation layers
    take their statistics from it alone, so a picture in tiles is close to the whole one, not equal.
    """

    size: int = 64
    overlap: int = 16

    def __post_init__(self) -> None:
        if whole("size", self.size) < 1:
            raise InputError(f"tiles of size={quoted(self.size)} are not possible; use 1 or more")
        if not 0 <= whole("overlap", self.overlap) <= self.size // 2:
            size, overlap, most = quoted(self.size), quoted(self.overlap), quoted(self.size // 2)
            raise InputError(f"tiles of size={size} cannot have overlap={overlap}; use 0..{most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How latents of the UNet relate to latents of the autoencoder."""

    factor: float
    shift: float = 0.0

    def to_vae(self, latents: Array) -> Array:
        """The autoencoder's latents, of the same shape."""
        scaled: Array = latents / self.factor + self.shift
        return scaled.astype(np.float32, copy=False)

    def to_unet(self, latents: Array) -> None:
        """Turn the autoencoder's ``latents`` into the UNet's, in place."""
        latents -= self.shift
        latents *= self.factor


class Vae(Closing):
    """The autoencoder of a bundle, or a bundle that is nothing else. Its encoder is opened when it is first used."""

    def __init__(
        self, bundle: Bundle, opener: Opener, tiles: Tiles | None = None, scaling_factor: float | None = None
    ) -> None:
        if "vae_decoder" not in bundle.manifest.networks:
            raise BundleError(f"{bundle.path} has no vae_decoder; export the bundle again")
        self.spec: VaeSpec = bundle.manifest.vae
        own = self.spec.scaling_factor
        factor = scaling_factor if own is None else own
        if factor is None:
            raise InputError(
                f"{bundle.path} does not say the scale of its latents; give scaling_factor: 0.18215 for Stable "
                "Diffusion 1.x and 2.x, 0.13025 for SDXL"
            )
        self.scale = Scale(factor=factor, shift=self.spec.shift_factor)
        self._bundle, self._opener, self._tiles = bundle, opener, tiles
        self._sessions = {"vae_decoder": self._open("vae_decoder")}

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        backend: str = "auto",
        tiles: Tiles | None = None,
        scaling_factor: float | None = None,
    ) -> Self:
        """Open the autoencoder of a bundled model by name, or of the bundle in a folder.

        Args:
            name_or_folder: the bundle.
            backend: a name in ``BACKENDS``, or ``"auto"``.
            tiles: work on large pictures in tiles; None is whole.
            scaling_factor: that of the model it is for, where the bundle does not say its own.

        Raises:
            BundleError: it is missing or corrupt, or has no decoder.
            BackendError: the backend is unknown or cannot run here.
            InputError: the scale of its latents is known neither to the bundle nor given.
        """
        check_backend(backend)
        if tiles is not None:
            instance("tiles", tiles, Tiles, "Tiles(size=64, overlap=16)")
        if scaling_factor is not None and finite("scaling_factor", scaling_factor) <= 0:
            raise InputError(f"scaling_factor={quoted(scaling_factor)} is not more than 0; give that of the model")
        bundle = Bundle.open(name_or_folder)
        chosen = choose_backend(backend, bundle.path)
        networks = bundle.manifest.networks

        def opener(bundle: Bundle, network: str) -> Session:
            return open_session(bundle.path, networks[network], chosen)

        return cls(bundle, opener, tiles, scaling_factor)

    def decode(self, latents: Array) -> Array:
        """Latents as the UNet knows them, (C, h, w), to pixels (f*h, f*w, 3) in 0..1.

        Raises:
            InputError: it is no such array.
        """
        return next(self.decode_all([_checked("latents", latents, self.spec.latent_channels)]))

    def decode_all(self, latents: Sequence[Array]) -> Iterator[Array]:
        """The same for several pictures of one size, in their order; those share a run that the session lets."""
        number = 0
        while number < len(latents):
            count = self._count("vae_decoder", latents[number:])
            together = np.stack(latents[number : number + count])
            for pixels in self._apply("vae_decoder", self.scale.to_vae(together)):
                yield np.clip(pixels.transpose(1, 2, 0) / 2 + 0.5, 0, 1)
            number += count

    def encode(self, pixels: Array) -> tuple[Array, Array]:
        """Pixels (3, f*h, f*w) in -1..1 to mean and log-variance of the latents, each (C, h, w) and not yet scaled.

        Raises:
            InputError: it is no such array.
        """
        (moments,) = self._apply("vae_encoder", _checked("pixels", pixels, 3, self.spec.downscale)[None])
        return moments[: self.spec.latent_channels], moments[self.spec.latent_channels :]

    def check_fits(self, spec: VaeSpec) -> None:
        """Raises InputError where a model with the autoencoder ``spec`` makes latents that are not of this one's."""
        own, other = (f"{s.latent_channels} channels, {s.downscale} pixels wide each" for s in (self.spec, spec))
        if own != other:
            raise InputError(f"the autoencoder {self._bundle.path} has latents of {own}; this model makes {other}")

    def close(self) -> None:
        """Give all memory back."""
        for session in self._sessions.values():
            session.close()

    def _open(self, network: str) -> Session:
        return self._opener(self._bundle, network)

    def _count(self, network: str, waiting: Sequence[Array]) -> int:
        """How many of the pictures share the next run."""
        if self._tiles is not None:
            return 1
        _, height, width = waiting[0].shape
        return max(1, min(len(waiting), self._session(network).capacity({"height": height, "width": width})))

    def _session(self, network: str) -> Session:
        if network not in self._bundle.manifest.networks:
            raise BundleError(f"{self._bundle.path} has no {network}, which a picture needs; export the bundle again")
        if network not in self._sessions:
            self._sessions[network] = self._open(network)
        return self._sessions[network]

    def _apply(self, network: str, source: Array) -> Array:
        """(N, C, height, width) through one half; one picture where that is in tiles."""
        session, factor = self._session(network), self.spec.downscale
        given, made = (1, factor) if network == "vae_decoder" else (factor, 1)

        def run(part: Array) -> Array:
            sizes = {"batch": len(part), "height": part.shape[2] // given, "width": part.shape[3] // given}
            session.reserve(sizes)
            session.write(session.inputs[0].name, sizes, part)
            session.run(sizes)
            return np.concatenate([session.buffer(spec.name, sizes) for spec in session.outputs], axis=1)

        try:
            if self._tiles is None:
                return run(source)
            return _tiled(lambda part: run(part[None])[0], source[0], given, made, self._tiles)[None]
        finally:
            session.trim()


def _tiled(run: Callable[[Array], Array], source: Array, given: int, made: int, tiles: Tiles) -> Array:
    """``run`` on tiles of ``source``, in which a latent is ``given`` wide, put together, where it is ``made`` wide."""
    height, width = source.shape[1] // given, source.shape[2] // given
    picture = strip = None
    for top, bottom in _spans(height, tiles):
        for left, right in _spans(width, tiles):
            tile = run(source[:, top * given : bottom * given, left * given : right * given])
            if strip is None or strip.shape[1] != tile.shape[1]:
                strip = np.empty((*tile.shape[:2], width * made), np.float32)
            _fade_in(strip.swapaxes(1, 2), tile.swapaxes(1, 2), left * made, tiles.overlap * made)
        assert strip is not None
        if picture is None:
            picture = np.empty((strip.shape[0], height * made, width * made), np.float32)
        _fade_in(picture, strip, top * made, tiles.overlap * made)
    assert picture is not None
    return picture


def _spans(length: int, tiles: Tiles) -> list[tuple[int, int]]:
    """Where tiles begin and end: the last is the first that reaches the end."""
    stride = tiles.size - tiles.overlap
    count = 1 + max(-(-(length - tiles.size) // stride), 0)
    return [(number * stride, min(number * stride + tiles.size, length)) for number in range(count)]


def _fade_in(canvas: Array, part: Array, start: int, overlap: int) -> None:
    """Put ``part`` into ``canvas`` from ``start`` on along axis 1; what stands there fades out over ``overlap``."""
    place = canvas[:, start : start + part.shape[1]]
    depth = min(overlap, part.shape[1]) if start > 0 else 0
    ramp = np.linspace(0, 1, depth, endpoint=False, dtype=np.float32)[:, None]
    place[:, :depth] += ramp * (part[:, :depth] - place[:, :depth])
    place[:, depth:] = part[:, depth:]


def _checked(name: str, value: object, channels: int, factor: int = 1) -> Array:
    """An array (``channels``, height, width) of floats, its sides multiples of ``factor``; raises InputError."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"
        raise InputError(f"{name} is {what}; give a numpy array of floats")
    sides = value.shape[1:]
    if value.ndim != 3 or value.shape[0] != channels or any(side < 1 or side % factor for side in sides):
        multiples = "" if factor == 1 else f", both multiples of {factor}"
        raise InputError(f"{name} has the shape {value.shape}; give ({channels}, height, width){multiples}")
    return value
