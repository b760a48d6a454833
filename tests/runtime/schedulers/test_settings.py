"""Names, settings and step counts: what is taken, and the one line that refuses the rest."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.schedulers import SCHEDULERS, create_solver

# Where every step counts as one of the checkpoint's own, so that any number up to 1000 is possible.
ALWAYS: dict[str, dict[str, Any]] = {"pndm": {"skip_prk_steps": True}}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=rf"num_inference_steps={steps} is outside 1\.\.1000; 20 is"):
        create_solver(name, {}, steps)


@pytest.mark.parametrize("steps", [2.5, True, "20", None])
def test_steps_that_are_no_whole_number(steps: Any) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps=.* is not a whole number"):
        create_solver("ddim", {}, steps)


@pytest.mark.parametrize(
    ("name", "offset", "most"), [("ddim", 0, 1000), ("ddpm", 1, 999), ("euler", 1, 999), ("dpmpp-2m", 1, 998)]
)
def test_more_steps_than_leading_spacing_has_room_for(name: str, offset: int, most: int) -> None:
    # Diffusers raises an IndexError beyond, or repeats timestep 0.
    config = {"timestep_spacing": "leading", "steps_offset": offset}
    assert len(create_solver(name, config, most)) == most
    with pytest.raises(InputError, match=r"use fewer steps|is outside"):
        create_solver(name, config, most + 1)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_terminal_snr_needs_a_prediction_that_survives_it(name: str) -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InputError, match="needs v_prediction or sample"):
        create_solver(name, config, 4)


def test_names_people_write() -> None:
    assert type(create_solver("DPMPP_2M", {}, 4)) is type(
        create_solver(None, {"_class_name": "DPMSolverMultistepScheduler"}, 4)
    )
    with pytest.raises(InputError, match=r"valid: ddim, ddpm, .*pndm"):
        create_solver("dpm-fast", {}, 4)


def test_a_short_name_says_the_algorithm_and_the_class_name_leaves_it_to_the_json() -> None:
    stochastic = {"algorithm_type": "sde-dpmsolver++", "_class_name": "DPMSolverMultistepScheduler"}
    assert create_solver(None, stochastic, 4).config.algorithm_type == "sde-dpmsolver++"
    assert create_solver("dpmpp-2m", stochastic, 4).config.algorithm_type == "dpmsolver++"
    assert create_solver("dpmpp-2m-sde", {}, 4).config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, r"prediction_type='flow'.*epsilon, v_prediction, sample"),
        ({"beta_schedule": "sigmoid"}, r"beta_schedule='sigmoid'.*linear, scaled_linear, squaredcos_cap_v2"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True is not supported; valid: False"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous' is not supported; valid: discrete"),
        ({"num_train_timesteps": 0}, r"num_train_timesteps=0 is outside 2\.\."),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000' is not a whole number"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps=1000.0 is not a whole number"),
        ({"steps_offset": True}, "steps_offset=True is not a whole number"),
        ({"beta_start": "small"}, "beta_start='small' is not a number"),
        ({"beta_end": float("nan")}, "beta_end=nan is not a number"),
        ({"beta_end": 1.5}, r"beta_end=1.5 is outside"),
        ({"beta_schedule": 3}, "beta_schedule=3 is not text"),
        ({"prediction_type": ["epsilon"]}, r"prediction_type=\['epsilon'\] is not text"),
        ({"final_sigmas_type": {}}, "final_sigmas_type={} is not text"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr='yes' is not true or false"),
        ({"trained_betas": 3}, "trained_betas=3 is not a list of numbers"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas=.* is not a list of numbers"),
        ({"trained_betas": [1e-9] * 1000}, r"num_train_timesteps=1000 numbers within 1e-06\.\.0\.999"),
        ({"trained_betas": [0.9] * 1000}, "the betas leave a signal of 0 at the last training timestep"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must hold num_train_timesteps=1000 numbers"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "exclude each other; keep one"),
        ({"sigma_spacing": "ays"}, "sigma_spacing='ays'.*valid: table, karras, exponential, beta, lu, ays-sd1"),
        ({"sigma_spacing": "karras", "sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min=3.0 and sigma_max=2.0 cross"),
        ({"sigma_spacing": "karras", "sigma_min": 1e5}, "leave noise levels from .* down to 100000; change them"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        create_solver("euler", config, 4)
    assert "\n" not in str(error.value)


def test_settings_of_other_solvers_are_ignored_as_in_diffusers() -> None:
    plain = create_solver("euler-a", {}, 4)
    assert create_solver("euler-a", {"use_karras_sigmas": True, "solver_order": 7}, 4).timesteps.tolist() == (
        plain.timesteps.tolist()
    )
    chosen = create_solver("euler-a", {"sigma_spacing": "karras"}, 4)
    assert chosen.timesteps.tolist() == create_solver("euler", {"use_karras_sigmas": True}, 4).timesteps.tolist()


def test_sigma_spacing_wins_over_the_flags_of_the_checkpoint() -> None:
    both = create_solver("euler", {"use_karras_sigmas": True, "sigma_spacing": "exponential"}, 5)
    assert both.timesteps.tolist() == create_solver("euler", {"use_exponential_sigmas": True}, 5).timesteps.tolist()
    table = create_solver("euler", {"use_karras_sigmas": True, "sigma_spacing": "table"}, 5)
    assert table.timesteps.tolist() == create_solver("euler", {}, 5).timesteps.tolist()


def test_settings_that_a_user_asks_for_are_not_ignored() -> None:
    with pytest.raises(InputError, match=r"ddim has no sigma_spacing; those that do: deis, .*unipc"):
        create_solver("ddim", {"sigma_spacing": "karras"}, 4)
    with pytest.raises(InputError, match="euler has no eta; those that do: ddim, tcd"):
        create_solver("euler", {"eta": 0.5}, 4)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_more_steps_than_a_distilled_model_has(name: str) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps=51 is more than the original_inference_steps=50"):
        create_solver(name, {}, 51)
    with pytest.raises(InputError, match=r"original_inference_steps=2000 is more than num_train_timesteps=1000"):
        create_solver(name, {"original_inference_steps": 2000}, 4)


def test_ends_that_cannot_be_reached() -> None:
    with pytest.raises(InputError, match="deis cannot reach sigma 0; end the list of sigmas with a small one"):
        create_solver("deis", {}, None, sigmas=[2.0, 1.0, 0.0])
    with pytest.raises(InputError, match="predict_x0=False cannot reach sigma 0; set final_sigmas_type"):
        create_solver("unipc", {"predict_x0": False}, 4)
    with pytest.raises(InputError, match="lambda_min_clipped=100 leaves no timestep"):
        create_solver("dpmpp-2m", {"lambda_min_clipped": 100}, 4)


@pytest.mark.parametrize(
    ("name", "lists", "message"),
    [
        ("euler", {"timesteps": [900, 950]}, "timesteps=.* do not fall from at most 999 to at least 0"),
        ("euler", {"timesteps": [1000, 1]}, "do not fall from at most 999"),
        ("euler", {"timesteps": []}, r"timesteps=\[\] is not a list of finite numbers"),
        ("euler", {"timesteps": ["a"]}, "is not a list of finite numbers"),
        ("euler", {"sigmas": [1.0]}, "the last one reached, so 2 or more"),
        ("euler", {"sigmas": [2.0, float("nan")]}, "is not a list of finite numbers"),
        ("euler", {"sigmas": [2.0, 1.0], "timesteps": [5, 1]}, "timesteps and sigmas were both given"),
        ("pndm", {"timesteps": [5, 1]}, "pndm takes no list of timesteps; those that do: .*euler"),
        ("ddim", {"sigmas": [5, 1]}, "ddim takes no list of sigmas; those that do: .*euler"),
        ("dpmpp-2m", {"timesteps": [5.5, 1]}, "looked up by this scheduler; use whole numbers"),
        ("ddim", {"timesteps": [5.5, 1]}, "looked up by this scheduler; use whole numbers"),
    ],
)
def test_lists_that_cannot_be_visited(name: str, lists: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_solver(name, {}, None, **lists)


def test_a_list_and_a_spacing_or_another_number_of_steps_exclude_each_other() -> None:
    with pytest.raises(InputError, match="a list of timesteps and sigma_spacing='karras' exclude each other"):
        create_solver("euler", {"use_karras_sigmas": True}, None, timesteps=[5, 1])
    with pytest.raises(InputError, match="num_inference_steps=3, but the list has 2 steps"):
        create_solver("euler", {}, 3, timesteps=[5, 1])


@pytest.mark.parametrize("strength", [-0.1, 1.2, float("nan")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(InputError, match=r"strength=.* is outside 0\.\.1"):
        create_solver("ddim", {}, 4).start_index(strength)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_strength_0_takes_no_step_and_1_takes_all(name: str) -> None:
    solver = create_solver(name, ALWAYS.get(name, {}), 7)
    assert solver.start_index(0) == len(solver)
    assert solver.start_index(1) == 0


def test_pndm_with_runge_kutta_steps() -> None:
    with pytest.raises(InputError, match="num_inference_steps=3 is too few for pndm"):
        create_solver("pndm", {}, 3)
    with pytest.raises(InputError, match=r"strength=0.5: pndm cannot start between its Runge-Kutta steps"):
        create_solver("pndm", {}, 10).start_index(0.5)


def test_dpm_solvers_of_noise_do_not_reach_sigma_0() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}
    with pytest.raises(InputError, match="cannot reach sigma 0; set final_sigmas_type to 'sigma_min'"):
        create_solver(None, config, 4)
    config |= {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}
    with pytest.raises(InputError, match="'sde-dpmsolver' has no solver_order=3; valid: 1, 2"):
        create_solver(None, config, 4)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("options", [{}, {"thresholding": True, "clip_sample": True, "solver_order": 3}])
def test_a_step_allocates_nothing(name: str, options: dict[str, Any]) -> None:
    solver = create_solver(name, {**ALWAYS.get(name, {}), **options}, 12)
    rng = np.random.default_rng(0)
    latents, noise_pred = rng.standard_normal((2, 4, 64, 64), np.float32)
    state = solver.new_state(latents.shape)
    for index in range(5):
        solver.step(state, index, noise_pred, latents, rng)
    tracemalloc.start()
    for index in range(5, len(solver)):
        solver.step(state, index, noise_pred, latents, rng)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Python's own small objects; one array of latents is 65,536 bytes.
    assert peak < 4096


def test_align_your_steps_is_that_of_the_model() -> None:
    with Pipeline.load("talbot") as pipeline:
        pictures = [
            pipeline(
                "fish",
                seed=3,
                num_inference_steps=2,
                scheduler="euler",
                scheduler_config={"sigma_spacing": spacing},
                output_type="latent",
            ).images[0]
            for spacing in ("ays", "ays-sd1", "ays-sdxl")
        ]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - pictures[2]).max() > 1e-3
