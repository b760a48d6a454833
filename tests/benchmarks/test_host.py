"""What the benchmark of the host's time measures, at a small size; how long it takes is not asked here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import host


def test_every_job_is_moved_by_one_step() -> None:
    jobs = host.eight_mixed(8)
    before = [(job.index, job.latents.copy()) for job in jobs]
    step = host.driver(jobs)
    step()
    assert [job.index for job in jobs] == [index + 1 for index, _ in before]
    assert all(np.isfinite(job.latents).all() for job in jobs)
    assert not any(np.array_equal(job.latents, latents) for job, (_, latents) in zip(jobs, before, strict=True))


def test_the_mixed_jobs_differ_in_all_that_matters() -> None:
    jobs = host.eight_mixed(8)
    assert len({job.index for job in jobs}) == 8
    assert {job.rows for job in jobs} == {1, 2}
    assert len({type(job.solver) for job in jobs}) == len(host.SOLVERS)


def test_a_step_allocates_next_to_nothing() -> None:
    for make in host.CASES.values():
        assert host.peak_bytes(lambda make=make: make(64)) < host.AIM_BYTES


def test_the_figures_are_those_of_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    host.main(["--side", "8", "--steps", "120"])
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "python -m benchmarks.host --side 8 --steps 120"
    assert report["latents"] == [4, 8, 8]
    for case in host.AIMS_US:
        own = report["cases"][case]["step_us"]
        assert 0 < own["min"] <= own["median"] <= own["p90"] <= own["p99"]
