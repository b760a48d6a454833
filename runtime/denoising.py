"""The denoising loop: jobs, each an image on its way, and one UNet that serves their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.acceleration import FeatureCache
from calotype.runtime.conditioning import Inputs
from calotype.runtime.guidance import Guidance
from calotype.runtime.inpainting import Known
from calotype.runtime.manifest import CACHING
from calotype.runtime.schedulers import Solver, State
from calotype.runtime.sessions import Session

Array = NDArray[np.float32]
INT8 = "unet_int8"  # the session of the network unet whose engine is in int8


@dataclasses.dataclass(kw_only=True)
class Job:
    """One image on its way. Nothing in it is shared with another job but what never changes.

    Attributes:
        latents: (C, h, w) float32, changed in place.
        conditional: the UNet's inputs for the prompt, one row of each.
        unconditional: for the negative prompt; None turns guidance off.
        context: (K, h, w), more channels of the UNet's sample, the same at every step; None is none.
        known: what of the latents is given.
        cache: of the deep feature; None evaluates the whole UNet at every step.
        int8: whether the whole UNet is the one in int8.
        index: the next model evaluation.
    """

    latents: Array
    conditional: Inputs
    unconditional: Inputs | None
    guidance: Guidance
    solver: Solver
    state: State
    rng: np.random.Generator
    context: Array | None = None
    known: Known | None = None
    cache: FeatureCache | None = None
    int8: bool = False
    index: int = 0

    @property
    def rows(self) -> int:
        """Rows of the UNet's batch that the next step of this job takes."""
        guided = self.unconditional is not None and self.guidance.active(self.solver.noise_level(self.index))
        return 2 if guided else 1

    @property
    def networks(self) -> tuple[str, ...]:
        """The sessions that it needs."""
        return unet_networks(caching=self.cache is not None, int8=self.int8)

    @property
    def done(self) -> bool:
        """Whether its schedule is through."""
        return self.index >= len(self.solver)


def unet_networks(*, caching: bool, int8: bool = False) -> tuple[str, ...]:
    """The sessions that the jobs of a call need, with or without a cache, which there is not in int8."""
    return CACHING if caching else (INT8,) if int8 else ("unet",)


class Denoiser:
    """Moves jobs one step at a time through a UNet; allocates nothing after a shape's first step.

    Args:
        sessions: by name: ``unet``, in int8 ``unet_int8``, or for jobs with a cache ``unet_deep`` and ``unet_shallow``.
            Others may lie there too, and what a job needs may be added as late as when the job is.
    """

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        self._sessions = sessions
        self._sizes: dict[tuple[int, ...], dict[str, int]] = {}
        # By network: the job whose inputs stand in its buffers, and the view by which the buffers are known again.
        self._filled: dict[str, tuple[Job, Array]] = {}

    def reserve(self, jobs: Sequence[Job]) -> None:
        """Allocate for any one of ``jobs``."""
        self._filled.clear()
        for job in jobs:
            for network in job.networks:
                self._sessions[network].reserve(self._sizes_of(job, 1 if job.unconditional is None else 2))

    def step(self, job: Job) -> None:
        """Evaluate the UNet, or of it what the job's cache does not stand for, and move the latents one step.

        One job is one run: a batch of several would let a matrix product's blocking, and so the last bits of an
        image, depend on what else is in it, and a CPU is not faster for it.
        """
        sizes = self._sizes_of(job, job.rows)
        shallow = job.cache is not None and job.cache.serves(sizes["rows"])
        network = "unet_shallow" if shallow else job.networks[0]
        unet = self._sessions[network]
        self._fill(network, job, sizes)
        if job.cache is not None and shallow:
            job.cache.give(unet.buffer("deep_feature", sizes))
        unet.run(sizes)
        if job.cache is not None and not shallow:
            job.cache.keep(unet.buffer("deep_feature", sizes))
        noise_pred = unet.buffer("noise_pred", sizes)  # (rows, C, h, w)
        if sizes["rows"] == 2:
            job.guidance.apply(noise_pred[0], noise_pred[1])
        job.solver.step(job.state, job.index, noise_pred[0], job.latents, job.rng)
        job.index += 1
        if job.known is not None:
            job.known.restore(job.latents, job.solver, job.index)

    def _fill(self, network: str, job: Job, sizes: Mapping[str, int]) -> None:
        """Write a step's inputs into the buffers; what does not change between steps, where it does not stand there."""
        unet, channels = self._sessions[network], job.latents.shape[0]
        text, filled = unet.buffer("encoder_hidden_states", sizes), self._filled.get(network)
        if filled is None or filled[0] is not job or filled[1] is not text:
            for index, inputs in enumerate((job.conditional, job.unconditional)[: sizes["rows"]]):
                for name, row in (inputs or {}).items():
                    unet.buffer(name, sizes)[index] = row
            self._filled[network] = job, text
        sample = unet.buffer("sample", sizes)  # (rows, C + K, h, w)
        job.solver.scale_model_input(job.latents, job.index, sample[0, :channels])
        if job.context is not None:
            sample[0, channels:] = job.context
        if sizes["rows"] == 2:
            sample[1] = sample[0]
        unet.buffer("timestep", sizes)[:] = job.solver.timesteps[job.index]

    def _sizes_of(self, job: Job, rows: int) -> dict[str, int]:
        _, height, width = job.latents.shape
        key = (rows, job.conditional["encoder_hidden_states"].shape[0], height, width)
        sizes = self._sizes.get(key)
        if sizes is None:
            sizes = {"rows": rows, "tokens": key[1], "height": height, "width": width}
            self._sizes[key] = sizes
        return sizes
