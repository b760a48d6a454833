"""Flow matching's solvers against diffusers' schedulers, step by step."""

from __future__ import annotations

import importlib
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import FLOW_SCHEDULERS, Solver, create_solver
from tests.runtime.schedulers.reference import SHAPE, TOLERANCE, Noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch

CLASSES = {"euler": diffusers.FlowMatchEulerDiscreteScheduler, "heun": diffusers.FlowMatchHeunDiscreteScheduler}
DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "mu": 1.7}
EULER: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    DYNAMIC,
    {**DYNAMIC, "time_shift_type": "linear"},
    {**DYNAMIC, "shift_terminal": 0.02},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {**DYNAMIC, "use_beta_sigmas": True},
    {**DYNAMIC, "stochastic_sampling": True},
    {"num_train_timesteps": 500, "shift": 2.0},
]


def settings_of(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": CLASSES[name].__name__, **config}


def reference(name: str, config: dict[str, Any], steps: int, sigmas: list[float] | None = None) -> Any:
    """Diffusers' scheduler with its noise levels set; ``timestep_spacing`` is the one that klein's pipeline gives."""
    known = {key: value for key, value in config.items() if key not in ("mu", "timestep_spacing")}
    found = CLASSES[name](**known)
    if sigmas is None and config.get("timestep_spacing") == "trailing":
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
    given = {"sigmas": sigmas, "mu": config.get("mu")} if name == "euler" else {}
    found.set_timesteps(steps, **given)
    found.set_begin_index(0)
    return found


def largest_error(solver: Solver, scheduler: Any, start: int = 0) -> float:
    """Over all steps, of a model that answers to what it is given."""
    np.testing.assert_allclose(solver.timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-3)
    scheduler.set_begin_index(start)
    rng = np.random.default_rng(5)
    clean, noise = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    latents = noise.copy() if start == 0 else solver.add_noise(clean, noise, start)
    if start and solver.evaluations_per_step == 1:
        wanted = scheduler.scale_noise(torch.from_numpy(clean)[None], scheduler.timesteps[start][None], noise)
        np.testing.assert_allclose(latents, wanted[0], atol=1e-6)
    expected, state, drawn, again = torch.from_numpy(latents.copy())[None], solver.new_state(SHAPE), Noise(), Noise()

    def randn(shape: Any, **_: Any) -> torch.Tensor:
        out = np.empty(tuple(shape), np.float32)
        again.standard_normal(dtype=np.float32, out=out)
        return torch.from_numpy(out)

    worst, given = 0.0, np.empty_like(latents)
    with mock.patch.object(importlib.import_module(type(scheduler).__module__), "randn_tensor", randn):
        for index in range(start, len(solver)):
            solver.scale_model_input(latents, index, given)
            output = 0.4 * given + rng.standard_normal(SHAPE, np.float32) * np.float32(0.3)
            solver.step(state, index, output, latents, drawn)
            # In float64: diffusers' Heun takes a difference of latents and divides it by a σ of 1e-3.
            answer = torch.from_numpy(output).double()[None]
            expected = scheduler.step(answer, scheduler.timesteps[index], expected).prev_sample
            worst = max(worst, float(np.abs(latents - expected[0].numpy()).max() / max(1, expected.abs().max())))
    return worst


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("config", EULER)
def test_euler_equals_diffusers(config: dict[str, Any], spacing: str, steps: int) -> None:
    config = {**config, "timestep_spacing": spacing}
    if config.get("shift_terminal") and steps == 1:
        return  # diffusers divides by nothing
    solver = create_solver("euler", settings_of("euler", config), steps, flow=True)
    assert largest_error(solver, reference("euler", config, steps)) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_equals_diffusers(shift: float, steps: int) -> None:
    solver = create_solver(None, settings_of("heun", {"shift": shift}), steps, flow=True)
    assert largest_error(solver, reference("heun", {"shift": shift}, steps)) <= TOLERANCE


@pytest.mark.parametrize("config", [own for own in EULER if not any(key.endswith("_sigmas") for key in own)])
def test_chosen_noise_levels_are_shifted_as_in_diffusers(config: dict[str, Any]) -> None:
    sigmas = [1.0, 0.8, 0.55, 0.2]
    solver = create_solver("euler", settings_of("euler", config), None, sigmas=[*sigmas, 0], flow=True)
    assert largest_error(solver, reference("euler", config, 4, sigmas)) <= TOLERANCE


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("steps", [4, 10])
def test_a_picture_is_taken_up_where_diffusers_does(steps: int, strength: float) -> None:
    solver = create_solver("euler", settings_of("euler", DYNAMIC), steps, flow=True)
    # Flux2KleinInpaintPipeline.get_timesteps
    start = int(max(steps - min(steps * strength, steps), 0))
    assert solver.start_index(strength) == start
    assert largest_error(solver, reference("euler", DYNAMIC, steps), start) <= TOLERANCE
    heun = create_solver("heun", settings_of("heun", {"shift": 3.0}), steps, flow=True)
    assert heun.start_index(strength) == 2 * start


def test_nothing_of_a_picture_is_given_up() -> None:
    for name in FLOW_SCHEDULERS:
        solver = create_solver(name, settings_of(name, {}), 4, flow=True)
        assert solver.start_index(0) == len(solver)


@pytest.mark.parametrize("name", sorted(FLOW_SCHEDULERS))
def test_a_model_that_knows_the_answer_is_led_to_it(name: str) -> None:
    solver = create_solver(name, {**settings_of("euler", DYNAMIC)}, 6, flow=True)
    rng = np.random.default_rng(1)
    clean, latents = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    noise, state = latents.copy(), solver.new_state(SHAPE)
    for index in range(len(solver)):
        solver.step(state, index, noise - clean, latents, Noise())
    np.testing.assert_allclose(latents, clean, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        ("ddim", {}, {}, "ddim is no scheduler for a model that is trained by flow matching; valid: euler, heun"),
        ("euler", {"_class_name": "DDIMScheduler"}, {}, "scheduler is DDIMScheduler, and it needs one of FlowMatchEul"),
        ("euler", {"use_dynamic_shifting": True}, {}, "use_dynamic_shifting needs mu"),
        ("euler", {"invert_sigmas": True}, {}, "invert_sigmas=True is not supported; valid: False"),
        ("euler", {"time_shift_type": "cubic"}, {}, "time_shift_type='cubic' is not supported; valid: exponential, li"),
        ("euler", {"shift": 0}, {}, "shift=0 is outside"),
        ("euler", {"sigma_spacing": "karras"}, {"sigmas": [1, 0]}, "exclude each other"),
        ("euler", {}, {"sigmas": [14.0, 0]}, "sigmas begin at 14; this model's noise levels are from 1 down to 0"),
        ("heun", {"sigma_spacing": "karras"}, {}, "heun has no sigma_spacing; those that do: euler"),
        ("heun", {"eta": 0.5}, {}, "heun has no eta; those that do: none"),
        ("euler", {}, {"timesteps": [999, 500]}, "euler takes no list of timesteps; those that do: none"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    name: str, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    steps = None if options else 4
    with pytest.raises(InputError, match=message):
        create_solver(name, settings_of("euler", {}) | config, steps, **options, flow=True)
