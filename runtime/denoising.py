"""The denoising loop: jobs, each an image on its way, and one UNet that serves their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.schedulers import Solver, State
from calotype.runtime.sessions import Session

Array = NDArray[np.float32]


@dataclasses.dataclass(kw_only=True)
class Job:
    """One image on its way. Nothing in it is shared with another job but the solver, which never changes.

    Attributes:
        latents: (C, h, w) float32, changed in place.
        conditional: (T, D) prompt embedding.
        unconditional: (T, D) negative prompt embedding; None turns guidance off and halves the work.
        index: the next model evaluation.
    """

    latents: Array
    conditional: Array
    unconditional: Array | None
    guidance_scale: float
    solver: Solver
    state: State
    rng: np.random.Generator
    index: int = 0

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch that a step of this job takes."""
        return 1 if self.unconditional is None else 2

    @property
    def done(self) -> bool:
        """Whether its schedule is through."""
        return self.index >= len(self.solver)


class Denoiser:
    """Moves jobs one step at a time through a UNet session; allocates nothing after a shape's first step."""

    def __init__(self, unet: Session) -> None:
        self._unet = unet
        self._sizes: dict[tuple[int, ...], dict[str, int]] = {}

    def reserve(self, jobs: Sequence[Job]) -> None:
        """Allocate for any one of ``jobs``."""
        for job in jobs:
            self._unet.reserve(self._sizes_of(job))

    def step(self, job: Job) -> None:
        """Evaluate the UNet for ``job`` and move its latents one step.

        One job is one run: a batch of several would let a matrix product's blocking, and so the last bits of an
        image, depend on what else is in it, and a CPU is not faster for it.
        """
        sizes = self._sizes_of(job)
        sample = self._unet.buffer("sample", sizes)  # (rows, C, h, w)
        job.solver.scale_model_input(job.latents, job.index, sample[0])
        embeddings = self._unet.buffer("encoder_hidden_states", sizes)  # (rows, T, D)
        embeddings[0] = job.conditional
        if job.unconditional is not None:
            sample[1] = sample[0]
            embeddings[1] = job.unconditional
        self._unet.buffer("timestep", sizes)[:] = job.solver.timesteps[job.index]
        self._unet.run(sizes)
        noise_pred = self._unet.buffer("noise_pred", sizes)  # (rows, C, h, w)
        prediction = noise_pred[0]
        if job.unconditional is not None:
            # unconditional + scale · (conditional - unconditional)
            prediction -= noise_pred[1]
            prediction *= job.guidance_scale
            prediction += noise_pred[1]
        job.solver.step(job.state, job.index, prediction, job.latents, job.rng)
        job.index += 1

    def _sizes_of(self, job: Job) -> dict[str, int]:
        _, height, width = job.latents.shape
        key = (job.rows, job.conditional.shape[0], height, width)
        sizes = self._sizes.get(key)
        if sizes is None:
            sizes = {"rows": key[0], "tokens": key[1], "height": height, "width": width}
            self._sizes[key] = sizes
        return sizes
