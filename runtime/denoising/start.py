"""Where an image's latents start: at noise, at a picture, or at a picture with a hole.

A job draws its random numbers in this order, each (C, h, w): its first noise; the posterior of the picture, where the
picture is used; the posterior of the picture without what the mask covers, where the UNet is shown that; then whatever
its scheduler draws at each step.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from calotype.runtime.arrays import Array
from calotype.runtime.denoising.known import Known
from calotype.runtime.pictures.autoencoder import Scale
from calotype.runtime.pictures.masks import Mask
from calotype.runtime.schedulers import Solver


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """What an autoencoder's encoder gives: a normal distribution over latents, (C, h, w), not yet scaled."""

    mean: Array
    logvar: Array

    def mode(self, scale: Scale) -> Array:
        """The likeliest latents as the denoising network knows them, (C, h, w)."""
        latents = self.mean.copy()
        scale.to_unet(latents)
        return latents

    def sample(self, rng: np.random.Generator, scale: Scale) -> Array:
        """Draw latents as the UNet knows them, (C, h, w)."""
        latents: Array = rng.standard_normal(self.mean.shape, np.float32)
        latents *= np.exp(self.logvar / 2)
        latents += self.mean
        scale.to_unet(latents)
        return latents


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Beginning:
    """What a job has of its own where it starts; the attributes are those of :class:`Job`."""

    latents: Array
    context: Array | None
    known: Known | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What the jobs of a call have in common where they start.

    Attributes:
        index: the first model evaluation; ``len(solver)`` starts at the end.
        picture: the posterior of the picture; None starts at noise.
        mask: (h, w), where to draw; None is everywhere.
        surroundings: the posterior of the picture without what the mask covers, for a UNet that is shown it.
    """

    solver: Solver
    scale: Scale
    index: int = 0
    picture: Posterior | None = None
    mask: Mask | None = None
    surroundings: Posterior | None = None

    def begin(self, noise: Array, rng: np.random.Generator) -> Beginning:
        """Where a job starts from ``noise`` (C, h, w), of unit variance and its own from now on."""
        clean = None if self.picture is None else self.picture.sample(rng, self.scale)
        context = known = None
        if self.mask is not None and self.surroundings is not None:
            shown = self.surroundings.sample(rng, self.scale)
            context = np.concatenate([self.mask[None].astype(np.float32), shown])
        elif self.mask is not None and clean is not None:
            known = Known(clean=clean, noise=noise.copy(), keep=~self.mask, scratch=np.empty_like(clean))
        if clean is None or self.index == 0:
            latents = noise
            latents *= np.float32(self.solver.init_noise_sigma)
        elif self.index == len(self.solver):
            latents = clean
        else:
            latents = self.solver.add_noise(clean, noise, self.index)
        return Beginning(latents=latents, context=context, known=known)
