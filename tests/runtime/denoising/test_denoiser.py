"""What a step writes into the UNet's buffers, and what it leaves there."""

from __future__ import annotations

import numpy as np

from calotype.runtime.denoising.denoiser import Denoiser, Job
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.diagnostics.benchmark import InstantSession
from calotype.runtime.schedulers import create_solver

SHAPE = (4, 8, 8)
TEXT = "encoder_hidden_states"


def new_job(value: float) -> Job:
    """A guided job whose embeddings are ``value``, and for the negative prompt minus that."""
    solver = create_solver("euler", {}, 20)
    row = np.full((77, 768), value, np.float32)
    return Job(
        latents=np.zeros(SHAPE, np.float32),
        conditional={TEXT: row},
        unconditional={TEXT: -row},
        guidance=Guidance(scale=7.5),
        solver=solver,
        state=solver.new_state(SHAPE),
        rng=np.random.default_rng(0),
    )


def rows(unet: InstantSession, count: int) -> list[float]:
    """The first value of each row of embeddings that the UNet was given."""
    buffer = unet.buffer(TEXT, {"rows": count, "tokens": 77, "height": 8, "width": 8})
    return [float(row[0, 0]) for row in buffer]


def test_embeddings_are_written_once_for_a_job_and_again_after_another() -> None:
    unet = InstantSession(4, 768)
    denoiser, (one, other) = Denoiser({"unet": unet}), (new_job(1), new_job(2))
    denoiser.reserve(one)
    denoiser.reserve(other)
    denoiser.step(one)
    assert rows(unet, 2) == [1, -1]
    buffer = unet.buffer(TEXT, {"rows": 2, "tokens": 77, "height": 8, "width": 8})
    buffer[:] = 5  # to be seen where it stays
    denoiser.step(one)
    assert rows(unet, 2) == [5, 5]
    denoiser.step(other)
    assert rows(unet, 2) == [2, -2]
    denoiser.step(one)
    assert rows(unet, 2) == [1, -1]


def test_buffers_that_were_allocated_again_are_written_again() -> None:
    unet = InstantSession(4, 768)
    denoiser, job = Denoiser({"unet": unet}), new_job(1)
    denoiser.reserve(job)
    denoiser.step(job)
    unet.reserve({"rows": 2, "tokens": 77, "height": 8, "width": 8})  # as a network that was closed and opened has it
    assert rows(unet, 2) == [0, 0]
    denoiser.step(job)
    assert rows(unet, 2) == [1, -1]


def test_a_job_whose_guidance_ends_gives_one_row() -> None:
    unet = InstantSession(4, 768)
    job = new_job(1)
    job.guidance = Guidance(scale=7.5, interval=(0.0, job.solver.noise_level(1)))
    denoiser = Denoiser({"unet": unet})
    for count in (1, 2):
        unet.reserve({"rows": count, "tokens": 77, "height": 8, "width": 8})
    for expected in ([1], [1, -1]):
        assert job.rows == len(expected)
        denoiser.step(job)
        assert rows(unet, len(expected)) == expected
