"""What a job says of the evaluations that are to come, and its schedule's early end."""

from __future__ import annotations

import numpy as np
import pytest

from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job, JobControl, Key, SessionKey
from calotype.runtime.schedulers import create_solver

SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def new_job(scheduler: str, steps: int, index: int = 0, controls: tuple[JobControl, ...] = ()) -> Job:
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
        controls=controls,
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


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "evaluations", [(range(5), range(2)), (range(1, 3),), (range(3, 5), range(4, 5)), (range(0),), ()]
)
def test_the_keys_to_come_are_those_that_come(evaluations: tuple[range, ...], early: bool) -> None:
    inputs = {"control_image": np.zeros((3, 16, 16), np.float32), "conditioning_scale": np.ones(3, np.float32)}
    controls = tuple(
        JobControl(session=SessionKey("controlnet", weights=str(number)), inputs=inputs, evaluations=own)
        for number, own in enumerate(evaluations)
    )
    job = new_job("heun", 5, controls=controls)
    advance(job)
    if early:
        job.end_early()
    expected, came = job.keys_to_come, list[Key]()
    while not job.done:
        active = [number for number, own in enumerate(evaluations) if job.index in own]
        assert [key.session.weights for key in job.key.controls] == [str(number) for number in active]
        assert [control for _, control in job.active_controls] == [controls[number] for number in active]
        came.append(job.key)
        advance(job)
    assert expected == list(dict.fromkeys(came))
