"""Names of samplers and schedules as AUTOMATIC1111's web interface has them."""

from __future__ import annotations

import pytest

from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.schedulers import SCHEDULERS, create_solver
from calotype.serving.errors import RequestRefusedError
from calotype.serving.webui.samplers import SAMPLERS, SCHEDULES, sampling


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.read(BUNDLED / "talbot")


@pytest.mark.parametrize(
    ("sampler", "schedule", "name", "spacing"),
    [
        ("Euler a", "automatic", "euler-a", None),
        ("euler A", None, "euler-a", None),
        ("DPM++ 2M", None, "dpmpp-2m", "karras"),
        ("DPM++ 2M", "Automatic", "dpmpp-2m", "karras"),
        ("DPM++ 2M", "Beta", "dpmpp-2m", "beta"),
        ("DPM++ 2M Karras", "Automatic", "dpmpp-2m", "karras"),
        ("Euler Karras", None, "euler", "karras"),
        ("DPM++ 2M Karras", "exponential", "dpmpp-2m", "exponential"),
        ("DPM++ 2M SDE", None, "dpmpp-2m-sde", "exponential"),
        ("DPM++ 2M SDE Exponential", None, "dpmpp-2m-sde", "exponential"),
        ("Euler", "Align Your Steps", "euler", "ays-sd1"),
        ("PLMS", None, "pndm", None),
        ("dpmpp-2m", None, "dpmpp-2m", None),
        ("DDIM", "automatic", "ddim", None),
    ],
)
def test_names_of_theirs_are_settings_of_ours(sampler: str, schedule: str | None, name: str, spacing: str) -> None:
    found, settings = sampling(sampler, schedule, "sd1")
    assert found == name
    assert settings.get("sigma_spacing") == spacing


def test_the_published_steps_are_those_of_the_family() -> None:
    assert sampling("Euler", "align_your_steps", "sdxl")[1] == {"sigma_spacing": "ays-sdxl"}


def test_where_the_timesteps_lie() -> None:
    assert sampling("Euler", "Uniform", "sd1")[1]["timestep_spacing"] == "linspace"
    assert sampling("Euler", "SGM Uniform", "sd1")[1]["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("sampler", [*SAMPLERS, *SCHEDULERS])
def test_every_sampler_is_one_that_there_is(sampler: str, manifest: Manifest) -> None:
    name, settings = sampling(sampler, None, manifest.family)
    create_solver(name, {**manifest.scheduler, **settings}, 5)


def test_every_scheduler_of_ours_has_a_name_of_theirs() -> None:
    assert {name for name, _ in SAMPLERS.values()} == set(SCHEDULERS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_one_that_there_is(schedule: str, manifest: Manifest) -> None:
    name, settings = sampling("Euler", schedule, manifest.family)
    create_solver(name, {**manifest.scheduler, **settings}, 5)


def test_what_is_unknown_is_refused_with_what_is_valid() -> None:
    with pytest.raises(RequestRefusedError, match=r"there is no sampler 'Restart'; valid: DPM\+\+ 2M, .*TCD") as error:
        sampling("Restart", None, "sd1")
    assert error.value.param == "sampler_name"
    with pytest.raises(RequestRefusedError, match="there is no schedule 'Turbo'; valid: Automatic, Uniform") as error:
        sampling("Euler", "Turbo", "sd1")
    assert error.value.param == "scheduler"
