"""What a job says of the evaluations that are to come, and its schedule's early end."""

from __future__ import annotations

import numpy as np
import pytest

from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.schedulers import create_solver

SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def new_job(scheduler: str, steps: int, index: int = 0) -> Job:
    solver = create_solver(scheduler, SETTINGS, steps)
    row = {"encoder_hidden_states": np.zeros((3, 2), np.float32)}
    return Job(
        latents=np.ones((4, 2, 2), np.float32),
        conditional=row,
        unconditional=None,
        guidance=Guidance(scale=1.0),
        solver=solver,
        state=solver.new_state((4, 2, 2)),
        rng=np.random.default_rng(0),
        index=index,
    )


def advance(job: Job) -> None:
    job.advance(np.zeros((job.rows, *job.latents.shape), np.float32))


@pytest.mark.parametrize(("scheduler", "index"), [("euler", 0), ("euler", 2), ("heun", 0), ("heun", 2), ("pndm", 0)])
def test_the_evaluations_to_come_are_those_that_come(scheduler: str, index: int) -> None:
    job = new_job(scheduler, 5, index)
    expected = job.evaluations_to_come
    while not job.done:
        assert job.evaluations_to_come == expected
        advance(job)
        expected -= 1
    assert expected == job.evaluations_to_come == 0


@pytest.mark.parametrize(
    ("scheduler", "evaluations", "step"),
    [("euler", 0, 1), ("euler", 1, 1), ("euler", 3, 3), ("heun", 0, 1), ("heun", 1, 1), ("heun", 2, 1), ("heun", 3, 2)],
)
def test_a_schedule_that_ends_early_ends_with_the_step_at_hand(scheduler: str, evaluations: int, step: int) -> None:
    job = new_job(scheduler, 5)
    for _ in range(evaluations):
        advance(job)
    job.end_early()
    while not job.done:
        advance(job)
    assert (job.step, job.steps, job.evaluations_left, job.evaluations_to_come) == (step, step, 0, 0)
    job.end_early()
    assert job.step == job.steps == step
