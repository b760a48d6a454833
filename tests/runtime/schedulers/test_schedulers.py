"""Every solver against diffusers' scheduler of the same name as it stands, step by step."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import SCHEDULERS, SchedulerConfig, create_solver
from tests.runtime.schedulers.reference import (
    ALWAYS,
    CLASSES,
    SHAPE,
    STABLE_DIFFUSION,
    TOLERANCE,
    Noise,
    compare,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch

# Diffusers puts arrays of NumPy and PyTorch together, which both will stop.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers(name: str, steps: int, prediction_type: str, timestep_spacing: str) -> None:
    config = {
        **STABLE_DIFFUSION,
        **ALWAYS.get(name, {}),
        "prediction_type": prediction_type,
        "timestep_spacing": timestep_spacing,
        "steps_offset": 1 if timestep_spacing == "leading" else 0,
    }
    # Two in which diffusers' own float32 is further from its float64 than the tolerance: many short steps, and one step
    # over the whole range by a difference of squares that are all but equal.
    exact = (name, steps) == ("deis", 50) or (name, steps, timestep_spacing) == ("dpm2-a", 2, "linspace")
    assert compare(name, config, steps, exact=exact) <= 1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_equals_diffusers_over_all_training_steps(name: str) -> None:
    config = {
        **STABLE_DIFFUSION,
        **ALWAYS.get(name, {}),
        **({"original_inference_steps": 1000} if name in ("lcm", "tcd") else {}),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    assert compare(name, config, 1000, exact=True) <= 1


@pytest.mark.parametrize("name", ["deis", "dpmpp-2m", "dpmpp-2m-sde", "unipc"])
def test_two_steps_at_one_timestep_change_nothing(name: str) -> None:
    # 1001 places of 1000 round to two that are the same, where diffusers divides by their distance.
    solver = create_solver(name, {**STABLE_DIFFUSION, "timestep_spacing": "linspace"}, 1000)
    assert len(set(solver.timesteps.tolist())) == 999
    latents = np.ones(SHAPE, np.float32)
    state = solver.new_state(SHAPE)
    for index in range(len(solver)):
        solver.step(state, index, np.zeros(SHAPE, np.float32), latents, Noise())
    assert np.isfinite(latents).all()


COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"set_alpha_to_one": False, "clip_sample": False}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0}),
        ("ddim", {"eta": 0.7, "clip_sample": False}),
        ("ddim", {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}),
        ("ddim", ZERO_SNR),
        ("ddpm", {"variance_type": "fixed_large", "clip_sample": False}),
        ("ddpm", {"variance_type": "fixed_small_log"}),
        ("ddpm", {"beta_schedule": "linear", "clip_sample_range": 2.0}),
        ("ddpm", {"thresholding": True, "sample_max_value": 1.5}),
        ("ddpm", ZERO_SNR),
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
        ("euler", {"use_exponential_sigmas": True}),
        ("euler", {"use_beta_sigmas": True}),
        ("euler", {**COSINE, "use_karras_sigmas": True}),
        ("euler", {"final_sigmas_type": "sigma_min", "beta_schedule": "linear"}),
        ("euler", ZERO_SNR),
        ("euler", {**ZERO_SNR, "use_karras_sigmas": True}),
        ("euler-a", COSINE),
        ("euler-a", ZERO_SNR),
        ("pndm", {}),
        ("pndm", {"prediction_type": "v_prediction", "set_alpha_to_one": True}),
        ("pndm", {"skip_prk_steps": True, "beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": True}),
        *(
            (name, options)
            for name in ("lms", "heun", "dpm2", "dpm2-a")
            for options in (
                {"use_karras_sigmas": True},
                {"use_exponential_sigmas": True},
                {"use_beta_sigmas": True},
                {**COSINE, "use_karras_sigmas": True},
                {"beta_schedule": "linear"},
            )
        ),
        ("heun", {"clip_sample": True}),
        ("heun", {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"}),
        *(
            ("deis", options)
            for options in (
                {"use_karras_sigmas": True},
                {"use_exponential_sigmas": True},
                {"use_beta_sigmas": True},
                {**COSINE, "use_karras_sigmas": True},
                {"solver_order": 1},
                {"solver_order": 3},
                {"solver_order": 3, "lower_order_final": False},
                {"thresholding": True, "sample_max_value": 2.0},
            )
        ),
        *(
            ("unipc", options)
            for options in (
                {"use_karras_sigmas": True},
                {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.1, "sigma_max": 10.0},
                {"use_exponential_sigmas": True},
                {"use_beta_sigmas": True},
                {**COSINE, "use_karras_sigmas": True},
                {"solver_order": 1},
                {"solver_order": 3},
                {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
                {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
                {"predict_x0": False, "final_sigmas_type": "sigma_min"},
                {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3, "solver_type": "bh1"},
                {"disable_corrector": [0, 1, 4]},
                {"thresholding": True, "sample_max_value": 2.0},
                ZERO_SNR,
            )
        ),
        *(
            (name, options)
            for name in ("lcm", "tcd")
            for options in (
                {"original_inference_steps": 100},
                {"beta_schedule": "squaredcos_cap_v2"},
                ZERO_SNR,
            )
        ),
        ("lcm", {"clip_sample": True}),
        ("lcm", {"thresholding": True, "sample_max_value": 2.0}),
        ("lcm", {"timestep_scaling": 0.01}),
        ("tcd", {"eta": 0.0}),
        ("tcd", {"eta": 1.0}),
        *(
            (name, {**ALWAYS.get(name, {}), **options})
            for name in ("dpmpp-2m", "dpmpp-2m-sde")
            for options in (
                {"use_karras_sigmas": True},
                {"use_exponential_sigmas": True},
                {"use_beta_sigmas": True},
                {"use_lu_lambdas": True},
                {**COSINE, "use_karras_sigmas": True},
                {**COSINE, "use_lu_lambdas": True},
                {"final_sigmas_type": "sigma_min", "lower_order_final": False},
                {"solver_type": "heun"},
                {"solver_order": 1},
                {"solver_order": 3},
                {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
                {"euler_at_final": True},
                {**COSINE, "lambda_min_clipped": -5.1},
                {**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
                {"thresholding": True, "sample_max_value": 2.0},
                ZERO_SNR,
            )
        ),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 12, 20, 50, pytest.param(1000, marks=pytest.mark.slow)])
def test_options_equal_diffusers(name: str, options: dict[str, Any], steps: int) -> None:
    config = {**STABLE_DIFFUSION, **options}
    if name == "pndm" and "skip_prk_steps" not in options and steps < 4:  # its Runge-Kutta steps alone are more
        with pytest.raises(InputError, match="too few for pndm"):
            create_solver(name, config, steps)
        return
    if steps == 1000:  # other spacings visit timesteps twice, where diffusers divides by their distance
        config |= {"timestep_spacing": "trailing"}
        config |= {"original_inference_steps": 1000} if name in ("lcm", "tcd") else {}
    # 12 steps as diffusers stands. At the other counts its own float32 is off from its float64 by more than 1e-5 in 56
    # of these cases, by 1e-2 in third-order UniPC's thousand steps: each step is held against float64, alone, from the
    # same latents. No case is excepted.
    assert compare(name, config, steps, exact=steps != 12) <= 1


@pytest.mark.parametrize(
    ("algorithm_type", "options"),
    [
        *(
            (algorithm_type, options)
            for algorithm_type in ("dpmsolver", "sde-dpmsolver")
            for options in (
                {},
                {"solver_type": "heun"},
                {"solver_order": 1},
                {"thresholding": True},
                {"prediction_type": "v_prediction"},
                {"prediction_type": "sample"},
            )
        ),
        ("dpmsolver", {"solver_order": 3}),  # neither side has a third order of the other
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_first_dpm_solvers_equal_diffusers(algorithm_type: str, options: dict[str, Any]) -> None:
    config = {**STABLE_DIFFUSION, **options, "algorithm_type": algorithm_type, "final_sigmas_type": "sigma_min"}
    assert compare("dpmpp-2m", config, 20) <= 1


TIMESTEPS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


@pytest.mark.parametrize("name", ["ddpm", "euler", "heun", "dpmpp-2m", "dpmpp-2m-sde", "lcm", "tcd"])
def test_a_list_of_timesteps_equals_diffusers(name: str) -> None:
    assert compare(name, {**STABLE_DIFFUSION, **ALWAYS.get(name, {})}, None, timesteps=TIMESTEPS) <= 1


def test_a_list_of_sigmas_equals_diffusers() -> None:
    assert compare("euler", STABLE_DIFFUSION, None, sigmas=[14.6, 6.5, 3.1, 1.2, 0.4, 0.0]) <= 1


@pytest.mark.parametrize(("spacing", "table"), [("ays-sd1", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL")])
def test_align_your_steps_equals_the_table_in_diffusers(spacing: str, table: str) -> None:
    published = diffusers.schedulers.AysSchedules
    solver = create_solver("euler", {**STABLE_DIFFUSION, "sigma_spacing": spacing}, 10)
    levels = [solver.noise_level(index) for index in range(10)]
    np.testing.assert_allclose(levels, published[f"{table}Sigmas"][:-1], rtol=1e-7)  # float32
    # The published timesteps are whole, and the sigmas have three decimals.
    np.testing.assert_allclose(solver.timesteps, published[f"{table}Timesteps"], atol=1)
    multistep = create_solver("dpmpp-2m", {**STABLE_DIFFUSION, "sigma_spacing": spacing}, 10)
    np.testing.assert_allclose(multistep.timesteps, published[f"{table}Timesteps"], atol=1)


def test_align_your_steps_between_the_published_numbers_of_steps() -> None:
    solver = create_solver("euler", {**STABLE_DIFFUSION, "sigma_spacing": "ays-sd1"}, 20)
    levels = [solver.noise_level(index) for index in range(20)]
    ten = diffusers.schedulers.AysSchedules["StableDiffusionSigmas"][:-1]
    np.testing.assert_allclose(levels[::2], ten, rtol=1e-7)  # float32
    np.testing.assert_allclose(levels[1:-1:2], np.sqrt(np.multiply(ten[1:], ten[:-1])), rtol=1e-7)  # float32


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("strength", [0.9, 0.5, 0.25])
def test_equals_diffusers_from_the_middle(name: str, strength: float) -> None:
    steps = 20
    config = {**STABLE_DIFFUSION, **ALWAYS.get(name, {})}
    start = (steps - int(steps * strength)) * CLASSES[name].order
    solver = create_solver(name, config, steps)
    assert solver.start_index(strength) == start
    assert compare(name, config, steps, start=start) <= 1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_noise_is_added_as_diffusers_does(name: str) -> None:
    config = {**STABLE_DIFFUSION, **ALWAYS.get(name, {})}
    solver = create_solver(name, config, 10)
    reference = CLASSES[name](**config)
    reference.set_timesteps(10)
    rng = np.random.default_rng(1)
    clean, noise = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    for step in (0, 3, 9):
        index = step * CLASSES[name].order
        if hasattr(reference, "set_begin_index"):
            reference.set_begin_index(index)
        wanted = reference.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), reference.timesteps[index, None])
        got = solver.add_noise(clean, noise, index)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_noise_level_is_that_of_the_timestep(name: str) -> None:
    config = {**STABLE_DIFFUSION, **ALWAYS.get(name, {})}
    solver = create_solver(name, config, 10)
    alphas = SchedulerConfig.from_json(config).alphas_cumprod().astype(np.float64)
    expected = np.interp(solver.timesteps, np.arange(1000), np.log((1 - alphas) / alphas) / 2)
    # Sigma is interpolated between whole timesteps, here its logarithm: 2e-3 apart at the steepest.
    levels = [solver.noise_level(index) for index in range(len(solver))]
    np.testing.assert_allclose(np.log(levels), expected, atol=2e-3)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_tables_equal_diffusers(beta_schedule: str) -> None:
    config = {"beta_schedule": beta_schedule}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    # The last digit of a small beta is one of 1: it must round as there, or small sigmas differ by 2e-5.
    np.testing.assert_allclose(SchedulerConfig.from_json(config).alphas_cumprod(), expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_snr_tables_equal_diffusers(beta_schedule: str) -> None:
    config = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    got = SchedulerConfig.from_json(config, settings=["rescale_betas_zero_snr"]).alphas_cumprod()
    assert got[-1] == 0
    # Some last digits of float32, as PyTorch's square root is not rounded right everywhere.
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-7)


def test_trained_betas_equal_diffusers() -> None:
    config = {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(SchedulerConfig.from_json(config).alphas_cumprod(), expected, rtol=0, atol=6e-8)
