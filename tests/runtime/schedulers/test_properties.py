"""What holds of every solver at any settings, drawn at random; and that diffusers agrees there."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import SCHEDULERS, SchedulerConfig, Solver, create_solver
from tests.runtime.schedulers.reference import ALWAYS, CLASSES, STABLE_DIFFUSION, Noise, compare

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
SHAPE = (2, 3, 5)
SPACED = {"euler", "lms", "heun", "dpm2", "dpm2-a", "dpmpp-2m", "dpmpp-2m-sde", "deis", "unipc"}
THRESHOLDED = {"ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "deis", "unipc", "lcm"}
RESCALED = {"ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "euler", "euler-a", "lcm", "tcd", "unipc"}


@st.composite
def configurations(draw: st.DrawFn, names: list[str]) -> tuple[str, dict[str, Any], int]:
    """A scheduler, settings that its class in diffusers has, and a number of steps that they leave room for."""
    name = draw(st.sampled_from(names))
    prediction = ["epsilon", "v_prediction"]
    config: dict[str, Any] = {
        **STABLE_DIFFUSION,
        **ALWAYS.get(name, {}),
        "beta_schedule": draw(st.sampled_from(["linear", "scaled_linear"])),
        # More of it leaves so little signal that float32 has no 1e-5 of what an epsilon is divided by.
        "beta_end": draw(st.floats(0.008, 0.012)),
        "timestep_spacing": draw(st.sampled_from(["leading", "trailing", "linspace"])),
        "steps_offset": draw(st.integers(0, 2)),
    }
    if name in SPACED and (flag := draw(st.sampled_from(["", "karras_sigmas", "exponential_sigmas", "beta_sigmas"]))):
        config[f"use_{flag}"] = True
    if name in THRESHOLDED and draw(st.booleans()):
        config |= {"thresholding": True, "sample_max_value": draw(st.floats(1.0, 3.0))}
    if name in RESCALED and draw(st.booleans()):
        config |= {"rescale_betas_zero_snr": True}
        prediction = ["v_prediction"]
    if name in {"dpmpp-2m", "dpmpp-2m-sde", "deis", "unipc"}:
        config |= {"solver_order": draw(st.sampled_from([1, 2, 3])), "lower_order_final": draw(st.booleans())}
    if name in {"dpmpp-2m", "dpmpp-2m-sde"}:
        config |= {"solver_type": draw(st.sampled_from(["midpoint", "heun"])), "euler_at_final": draw(st.booleans())}
        config |= {"final_sigmas_type": draw(st.sampled_from(["zero", "sigma_min"]))}
    if name == "unipc":
        # Diffusers divides by an infinite step where the first of these two ends at sigma 0.
        config |= {"solver_type": draw(st.sampled_from(["bh1", "bh2"])), "final_sigmas_type": "sigma_min"}
    config["prediction_type"] = draw(st.sampled_from(prediction))
    return name, config, draw(st.integers(1, 49))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configurations(sorted(CLASSES)))
def test_equals_diffusers_at_random_settings(case: tuple[str, dict[str, Any], int]) -> None:
    name, config, steps = case
    assert compare(name, config, steps, exact=True) <= 1


def perfect(solver: Solver, clean: np.ndarray, latents: np.ndarray, index: int) -> np.ndarray:
    """What a model predicts that knows the clean latents."""
    sigma = solver.noise_level(index)
    given = np.empty_like(latents)
    solver.scale_model_input(latents, index, given)
    signal, noise = np.cos(np.arctan(sigma)), np.sin(np.arctan(sigma))
    scaled = given.astype(np.float64)
    match solver.config.prediction_type:
        case "sample":
            return clean
        case "epsilon":
            return ((scaled - signal * clean) / noise).astype(np.float32)
        case _:
            return ((signal * scaled - clean) / noise).astype(np.float32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(configurations(sorted(set(SCHEDULERS) - {"deis", "tcd"})), st.sampled_from([1.0, 0.7, 0.3]))
def test_a_model_that_knows_the_answer_is_led_to_it(case: tuple[str, dict[str, Any], int], strength: float) -> None:
    name, config, steps = case
    # DEIS and TCD end at a sigma above 0. PNDM extrapolates what the model predicts, of which only epsilon stays the
    # same; it and DDIM count on the distance that "leading" has.
    if name == "pndm":
        config["prediction_type"] = "epsilon"
    if name in ("ddim", "pndm"):
        config["timestep_spacing"] = "leading"
    # LMS and PNDM start in the middle as diffusers lets them, which only ends near it.
    whole = strength == 1 or name in ("lms", "pndm")
    config |= {"final_sigmas_type": "zero", "set_alpha_to_one": True, "thresholding": False, "clip_sample": False}
    solver = create_solver(name, config, steps)
    rng = np.random.default_rng(steps)
    clean, noise = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    start = 0 if whole else solver.start_index(strength)
    if start == len(solver):
        return
    latents = solver.add_noise(clean, noise, start)
    state = solver.new_state(SHAPE)
    for index in range(start, len(solver)):
        solver.step(state, index, perfect(solver, clean, latents, index), latents, Noise())
    # The last step leaves what the last noise level makes of float32's roundings at the first.
    np.testing.assert_allclose(latents, clean, atol=0.01)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(configurations(sorted(SCHEDULERS)))
def test_noise_falls_and_tables_fit_together(case: tuple[str, dict[str, Any], int]) -> None:
    name, config, steps = case
    solver = create_solver(name, config, steps)
    again = create_solver(name, config, steps)
    levels = np.array([solver.noise_level(index) for index in range(len(solver))])
    assert len(solver) == len(solver.timesteps) == len(levels)
    assert (solver.timesteps >= 0).all() and (solver.timesteps <= 999).all()
    assert (levels > 0).all() and levels[0] == levels.max()
    # A second evaluation of one step may lie below the first of the next.
    firsts = levels[:: solver.evaluations_per_step]
    assert (np.diff(firsts) <= 0).all()
    indices = [solver.start_index(strength) for strength in (0, 0.2, 0.5, 0.8, 1)]
    assert indices[0] == len(solver) and indices[-1] == 0 and indices == sorted(indices, reverse=True)
    assert again.timesteps.tolist() == solver.timesteps.tolist()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["zero", "linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
NAMES = [field.name for field in dataclasses.fields(SchedulerConfig)] + ["use_karras_sigmas", "use_flow_sigmas"]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(SCHEDULERS)),
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3),
    st.integers(-1, 60),
)
def test_any_json_makes_a_solver_or_one_line_that_refuses_it(name: str, config: dict[str, Any], steps: int) -> None:
    try:
        solver = create_solver(name, config, steps)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(solver.timesteps).all()
