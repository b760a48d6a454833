"""Jobs of every kind in one loop: what a run writes, who shares it, and that each job comes out as it does alone.

The network here is of a few lines: what it predicts of a row depends on all that the row is given, so that a row that
was given another's inputs shows. ``test_interleaving.py`` has a real one.
"""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.feature_cache import FeatureCache
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job, SessionKey
from calotype.runtime.denoising.known import Known
from calotype.runtime.diagnostics.benchmark import InstantSession
from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions.session import Sizes

SHAPE = (4, 8, 8)
TEXT = "encoder_hidden_states"


class Network(InstantSession):
    """Predicts the mean of a row's text times its timestep, plus a share of its sample; counts its runs.

    ``unet_deep`` also makes a feature of its text and timestep, and ``unet_shallow`` predicts from that.
    """

    def __init__(self, name: str = "unet", capacity: int = 2) -> None:
        feature = [TensorSpec(name="deep_feature", dtype="float32", shape=("rows", 1, "height", "width"))]
        super().__init__(
            4,
            8,
            capacity,
            inputs=feature if name == "unet_shallow" else (),
            outputs=feature if name == "unet_deep" else (),
        )
        self.name, self.runs = name, list[int]()

    def run(self, sizes: Sizes) -> None:
        self.runs.append(sizes["rows"])
        text, times, sample, out = (self.buffer(name, sizes) for name in (TEXT, "timestep", "sample", "noise_pred"))
        deep = text.mean(axis=(1, 2)) * (times / 1000 + 1)
        if self.name == "unet_deep":
            self.buffer("deep_feature", sizes)[:] = deep[:, None, None, None]
        elif self.name == "unet_shallow":
            deep = self.buffer("deep_feature", sizes)[:, 0, 0, 0]
        out[:] = sample[:, :4] / 4 + deep[:, None, None, None]


class Unets:
    """One of each network, found by a key."""

    def __init__(self, capacity: int = 2) -> None:
        self.by_name = {name: Network(name, capacity) for name in ("unet", "unet_deep", "unet_shallow")}

    def __call__(self, key: SessionKey) -> Network:
        return self.by_name[key.network]

    @property
    def runs(self) -> list[int]:
        """The rows of every run, by network."""
        return [rows for unet in self.by_name.values() for rows in unet.runs]


def new_job(
    value: float = 1.0,
    *,
    scale: float = 7.5,
    scheduler: str = "euler",
    steps: int = 6,
    interval: tuple[float, float] | None = None,
    tokens: int = 5,
    cache: int = 1,
    masked: bool = False,
    start: int = 0,
) -> Job:
    """A job whose embeddings are ``value``, and for the negative prompt minus half of that."""
    solver, rng = create_solver(scheduler, {"skip_prk_steps": True}, steps), np.random.default_rng(int(value * 8))
    row, latents = np.full((tokens, 8), value, np.float32), rng.standard_normal(SHAPE, np.float32)
    clean = rng.standard_normal(SHAPE, np.float32)
    return Job(
        latents=latents,
        conditional={TEXT: row},
        unconditional={TEXT: -row / 2} if scale > 1 else None,
        guidance=Guidance(scale=scale, interval=interval),
        solver=solver,
        state=solver.new_state(SHAPE),
        rng=rng,
        cache=FeatureCache(cache, (2, 1, 8, 8)) if cache > 1 else None,
        known=Known(clean=clean, noise=latents.copy(), keep=np.eye(8, dtype=bool), scratch=clean.copy())
        if masked
        else None,
        index=start,
    )


MIXED: list[dict[str, Any]] = [
    {"value": 1.0},
    {"value": 2.0, "scale": 1.0},
    {"value": 3.0, "interval": (0.5, 5.0)},
    {"value": 4.0, "scheduler": "heun", "steps": 4},
    {"value": 5.0, "scheduler": "dpmpp-2m", "scale": 1.0, "tokens": 10},
    {"value": 6.0, "cache": 3},
    {"value": 7.0, "cache": 2, "interval": (0.5, 5.0), "scheduler": "ddim"},
    {"value": 8.0, "masked": True, "scheduler": "euler-a"},
    {"value": 9.0, "scheduler": "pndm", "start": 2},
    {"value": 10.0, "scale": 1.0, "cache": 3, "masked": True},
]


def alone(settings: dict[str, Any]) -> bytes:
    """The latents that a job ends with when nothing else is drawn."""
    job, denoiser = new_job(**settings), Denoiser(Unets())
    while not job.done:
        denoiser.step([job])
    return job.latents.tobytes()


@pytest.mark.parametrize("capacity", [2, 3, 8, 100])
def test_mixed_jobs_come_out_as_alone(capacity: int) -> None:
    unets = Unets(capacity)
    jobs, denoiser = [new_job(**settings) for settings in MIXED], Denoiser(unets)
    denoiser.reserve(jobs)
    while not all(job.done for job in jobs):
        denoiser.step(jobs)
    for job, settings in zip(jobs, MIXED, strict=True):
        assert job.latents.tobytes() == alone(settings), settings
    assert max(unets.runs) <= capacity


@pytest.mark.parametrize("seed", range(5))
def test_jobs_that_come_and_go_at_any_step_come_out_as_alone(seed: int) -> None:
    choose = random.Random(seed)
    order = choose.sample(MIXED, len(MIXED))
    waiting, running, denoiser = [(settings, new_job(**settings)) for settings in order], [], Denoiser(Unets(6))
    finished = []
    while waiting or running:
        while waiting and choose.random() < 0.5:
            running.append(waiting.pop())
        some = [job for _, job in running if choose.random() < 0.7]
        before = [job.step for job in some]
        denoiser.step(some)
        assert [job.step for job in some] == [step + 1 for step in before]
        finished += [(settings, job) for settings, job in running if job.done]
        running = [(settings, job) for settings, job in running if not job.done]
    for settings, job in finished:
        assert job.latents.tobytes() == alone(settings), settings


def test_a_guided_job_is_guided_behind_an_unguided_one_and_the_other_way_round() -> None:
    """In the first round of this project the first job's rows counted for all, and the others came out wrong."""
    guided, unguided = {"value": 1.0}, {"value": 2.0, "scale": 1.0}
    for order in ([guided, unguided], [unguided, guided]):
        unets = Unets(100)
        jobs, denoiser = [new_job(**settings) for settings in order], Denoiser(unets)
        denoiser.step(jobs)
        assert unets.runs == [3]
        while not jobs[0].done:
            denoiser.step(jobs)
        assert [job.latents.tobytes() for job in jobs] == [alone(settings) for settings in order]


def test_a_step_takes_as_few_runs_as_fit() -> None:
    unets = Unets(4)
    jobs = [new_job(float(number), scale=1.0 if number < 3 else 5.0) for number in range(1, 7)]  # 1, 1, 2, 2, 2, 2 rows
    Denoiser(unets).step(jobs)
    assert sorted(unets.runs) == [2, 4, 4]
    heun = [new_job(1.0, scheduler="heun"), *(new_job(float(number)) for number in (2, 3))]
    unets = Unets(4)
    Denoiser(unets).step(heun)
    assert unets.runs == [4, 4]  # each evaluation of the solver of second order takes another along


def test_jobs_that_may_not_share_are_refused() -> None:
    denoiser = Denoiser(Unets(100))
    with pytest.raises(InputError, match="cannot share a run; use those that pick"):
        denoiser.run([new_job(), new_job(tokens=10)])
    assert denoiser.pick([new_job(tokens=10), job := new_job(), new_job(tokens=10)])[1] is not job


def test_rows_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"a row of encoder_hidden_states has the shape \(5, 7\); the network takes"):
        job = new_job()
        wrong = Job(
            latents=job.latents,
            conditional={TEXT: np.zeros((5, 7), np.float32)},
            unconditional=None,
            guidance=job.guidance,
            solver=job.solver,
            state=job.state,
            rng=job.rng,
        )
        Denoiser(Unets()).step([wrong])
    with pytest.raises(InputError, match="the rows with and without the prompt differ"):
        Job(
            latents=job.latents,
            conditional={TEXT: np.zeros((5, 8), np.float32)},
            unconditional={TEXT: np.zeros((10, 8), np.float32)},
            guidance=job.guidance,
            solver=job.solver,
            state=job.state,
            rng=job.rng,
        )


@pytest.mark.parametrize(
    ("scheduler", "start", "steps"),
    [("heun", 0, 20), ("dpm2", 0, 20), ("pndm", 0, 20), ("euler", 0, 20), ("heun", 19, 11), ("pndm", 10, 10)],
)
def test_steps_are_steps_and_not_evaluations(scheduler: str, start: int, steps: int) -> None:
    """Heun takes 39 evaluations for 20 steps: what is counted are the 20."""
    solver = create_solver(scheduler, {"skip_prk_steps": True}, 20)
    job = new_job(scheduler=scheduler, steps=20, start=start if scheduler != "heun" or start == 0 else 18)
    denoiser, seen = Denoiser(Unets()), []
    assert job.steps == steps
    while not job.done:
        denoiser.step([job])
        seen.append(job.step)
    assert seen == list(range(1, steps + 1))
    assert job.index == len(solver)


def test_a_job_that_is_done_is_left_alone_and_not_kept() -> None:
    denoiser, job = Denoiser(Unets()), new_job(steps=1)
    denoiser.step([job])
    latents = job.latents.copy()
    denoiser.step([job])
    np.testing.assert_array_equal(job.latents, latents)
    reference = weakref.ref(job)
    del job
    gc.collect()
    assert reference() is None


def written(unet: Network, count: int) -> list[float]:
    """The first value of each row of embeddings that the network was given."""
    buffer = unet.buffer(TEXT, {"rows": count, "height": 8, "width": 8, "tokens": 5})
    return [float(row[0, 0]) for row in buffer]


def test_what_stays_the_same_is_written_once_for_a_job_and_again_after_another() -> None:
    unets = Unets()
    denoiser, one, other = Denoiser(unets), new_job(2), new_job(4)
    unet = unets.by_name["unet"]
    denoiser.step([one])
    assert written(unet, 2) == [2, -1]
    unet.buffer(TEXT, {"rows": 2, "height": 8, "width": 8, "tokens": 5})[:] = 5  # to be seen where it stays
    denoiser.step([one])
    assert written(unet, 2) == [5, 5]
    denoiser.step([other])
    assert written(unet, 2) == [4, -2]
    denoiser.step([one])
    assert written(unet, 2) == [2, -1]


def test_what_was_written_to_buffers_that_moved_is_written_again() -> None:
    unets = Unets()
    denoiser, job, unet = Denoiser(unets), new_job(2), unets.by_name["unet"]
    denoiser.step([job])
    unet._forget_all()  # as a network that was closed and opened has it
    assert written(unet, 2) == [0, 0]
    denoiser.step([job])
    assert written(unet, 2) == [2, -1]


def test_an_error_in_a_run_leaves_the_jobs_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    unets = Unets(8)
    denoiser, jobs = Denoiser(unets), [new_job(**MIXED[0]), new_job(**MIXED[1])]
    denoiser.step(jobs)

    def fail(_: Network, __: Sizes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Network, "run", fail)
        denoiser.step(jobs)
    while not all(job.done for job in jobs):
        denoiser.step(jobs)
    assert [job.latents.tobytes() for job in jobs] == [alone(settings) for settings in MIXED[:2]]
