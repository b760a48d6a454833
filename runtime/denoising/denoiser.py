"""The denoising loop: jobs, each an image on its way, and one UNet that serves their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.manifest import CACHING
from calotype.runtime.denoising.acceleration import FeatureCache
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.pictures.masks import Known
from calotype.runtime.schedulers import Solver, State
from calotype.runtime.sessions import Session
from calotype.runtime.text.encoders import Inputs

Array = NDArray[np.float32]
INT8 = "unet_int8"  # the session of the network unet whose engine is in int8


@dataclasses.dataclass(kw_only=True, eq=False)
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
        return self._rows_at(self.index)

    @property
    def rows_to_come(self) -> tuple[int, ...]:
        """The same for each step that is left."""
        return tuple(self._rows_at(index) for index in range(self.index, len(self.solver)))

    @property
    def networks(self) -> tuple[str, ...]:
        """The sessions that it needs."""
        return unet_networks(caching=self.cache is not None, int8=self.int8)

    @property
    def done(self) -> bool:
        """Whether its schedule is through."""
        return self.index >= len(self.solver)

    @property
    def _phase(self) -> tuple[Any, ...]:
        """What two jobs must have in common to go through the UNet together until they are done."""
        tokens = self.conditional["encoder_hidden_states"].shape[0]
        interval = None if self.cache is None else self.cache.interval
        return self.networks, self.latents.shape, tokens, self.rows_to_come, interval

    def _rows_at(self, index: int) -> int:
        guided = self.unconditional is not None and self.guidance.active(self.solver.noise_level(index))
        return 2 if guided else 1


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
        # By network: the jobs whose inputs stand in its buffers, and the view by which the buffers are known again.
        self._filled: dict[str, tuple[tuple[Job, ...], Array]] = {}

    def batches(self, jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
        """``jobs`` in those that go through the UNet together until they are done, as many as its sessions take."""
        alike: dict[tuple[Any, ...], list[Job]] = {}
        for job in jobs:
            alike.setdefault(job._phase, []).append(job)
        found = []
        for waiting in alike.values():
            while waiting:
                count = next((n for n in range(len(waiting), 1, -1) if self._takes(waiting[0], n)), 1)
                found.append(tuple(waiting[:count]))
                del waiting[:count]
        return sorted(found, key=lambda batch: jobs.index(batch[0]))

    def reserve(self, *jobs: Job) -> None:
        """Allocate for the steps of a batch."""
        self._filled.clear()
        for sizes in self._sizes_to_come(jobs[0], len(jobs)):
            for network in jobs[0].networks:
                self._sessions[network].reserve(sizes)

    def step(self, *jobs: Job) -> None:
        """Evaluate the UNet, or of it what the jobs' caches do not stand for, and move their latents one step.

        ``jobs`` are a batch: its rows are each job's conditional one and then, where guidance is on, its other one.
        """
        first = jobs[0]
        each = first.rows
        sizes = self._sizes_of(first, each * len(jobs))
        shallow = first.cache is not None and first.cache.serves(each)
        network = "unet_shallow" if shallow else first.networks[0]
        unet = self._sessions[network]
        self._fill(network, jobs, each, sizes)
        if first.cache is None:
            unet.run(sizes)
        else:
            self._run_cached(network, jobs, sizes)
        noise_pred = iter(unet.buffer("noise_pred", sizes))  # (rows, C, h, w)
        for job in jobs:
            conditional = next(noise_pred)
            if each == 2:
                job.guidance.apply(conditional, next(noise_pred))
            job.solver.step(job.state, job.index, conditional, job.latents, job.rng)
            job.index += 1
            if job.known is not None:
                job.known.restore(job.latents, job.solver, job.index)

    def _run_cached(self, network: str, jobs: Sequence[Job], sizes: Mapping[str, int]) -> None:
        """Run, with each job's deep feature handed in, or taken over."""
        unet, each = self._sessions[network], sizes["rows"] // len(jobs)
        feature = unet.buffer("deep_feature", sizes)  # (rows, C, h, w)
        rows = [feature[row : row + each] for row in range(0, sizes["rows"], each)]
        caches = [job.cache for job in jobs if job.cache is not None]
        if network == "unet_shallow":
            for cache, own in zip(caches, rows, strict=True):
                cache.give(own)
            unet.run(sizes)
        else:
            unet.run(sizes)
            for cache, own in zip(caches, rows, strict=True):
                cache.keep(own)

    def _fill(self, network: str, jobs: tuple[Job, ...], each: int, sizes: Mapping[str, int]) -> None:
        """Write a step's inputs into the buffers; what does not change between steps, where it does not stand there."""
        unet, channels = self._sessions[network], jobs[0].latents.shape[0]
        text, filled = unet.buffer("encoder_hidden_states", sizes), self._filled.get(network)
        if filled is None or filled[0] != jobs or filled[1] is not text:
            row = 0
            for job in jobs:
                for inputs in (job.conditional, job.unconditional)[:each]:
                    for name, value in (inputs or {}).items():
                        unet.buffer(name, sizes)[row] = value
                    row += 1
            self._filled[network] = jobs, text
        sample, timestep = unet.buffer("sample", sizes), unet.buffer("timestep", sizes)  # (rows, C + K, h, w), (rows,)
        row = 0
        for job in jobs:
            own = sample[row]
            job.solver.scale_model_input(job.latents, job.index, own[:channels])
            if job.context is not None:
                own[channels:] = job.context
            if each == 2:
                sample[row + 1] = own
            timestep[row : row + each] = job.solver.timesteps[job.index]
            row += each

    def _takes(self, job: Job, count: int) -> bool:
        """Whether so many jobs like ``job`` may share their runs."""
        return all(
            sizes["rows"] <= self._sessions[network].capacity(sizes)
            for sizes in self._sizes_to_come(job, count)
            for network in job.networks
        )

    def _sizes_to_come(self, job: Job, count: int) -> list[dict[str, int]]:
        """Of the runs of so many jobs like ``job``, the largest first."""
        return [self._sizes_of(job, rows * count) for rows in sorted(set(job.rows_to_come), reverse=True)]

    def _sizes_of(self, job: Job, rows: int) -> dict[str, int]:
        _, height, width = job.latents.shape
        key = (rows, job.conditional["encoder_hidden_states"].shape[0], height, width)
        sizes = self._sizes.get(key)
        if sizes is None:
            sizes = {"rows": rows, "tokens": key[1], "height": height, "width": width}
            self._sizes[key] = sizes
        return sizes
