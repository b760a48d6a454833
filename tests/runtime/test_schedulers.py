"""Every solver against diffusers' scheduler of the same name as it stands, step by step."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest

from calotype.runtime.schedulers import SCHEDULERS, SchedulerConfig, Solver, create_solver

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch

# Diffusers puts arrays of NumPy and PyTorch together, which both will stop.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
# Of the largest magnitude in the latents, or of 1 where that is less. Where latents are clean + sigma·noise they are as
# large as sigma, and where a random model's errors are divided by a small signal they grow likewise: float32 resolves
# 6e-8 of either, and both sides round every step.
TOLERANCE = 1e-5
# A sigma of thousands (zero terminal SNR, cosine betas) leaves its rounding errors in latents that shrink: there two of
# them are allowed besides, of the largest latents so far. Epsilon is no use there: it is divided by a signal of 1e-4.
ROUNDINGS = 2 * 2.0**-24
HUGE = 1000
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "dpm2": diffusers.KDPM2DiscreteScheduler,
    "dpm2-a": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp-2m-sde": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
    "tcd": diffusers.TCDScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
# What tells two solvers of one class of diffusers apart, and what its defaults cannot be run with.
ALWAYS: dict[str, dict[str, Any]] = {
    "dpmpp-2m-sde": {"algorithm_type": "sde-dpmsolver++"},
    "pndm": {"skip_prk_steps": True},
}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Diffusers' classes do not know "sample" for these.
NO_SAMPLE = {"dpm2", "dpm2-a", "euler-a", "pndm"}
SHAPE = (4, 8, 8)


class Noise:
    """The same normal numbers for both sides, in the order of the steps."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(11)

    def standard_normal(self, *, dtype: Any, out: np.ndarray) -> None:
        out[:] = self._rng.standard_normal(out.shape).astype(dtype)


@pytest.fixture(autouse=True)
def reference_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers draws from ``REFERENCE_NOISE`` too, a new one for each comparison."""

    def randn(shape: Any, **_: Any) -> torch.Tensor:
        out = np.empty(tuple(shape), np.float32)
        REFERENCE_NOISE[0].standard_normal(dtype=np.float32, out=out)
        return torch.from_numpy(out)

    for kind in set(CLASSES.values()):
        monkeypatch.setattr(importlib.import_module(kind.__module__), "randn_tensor", randn, raising=False)


REFERENCE_NOISE = [Noise()]


def compare(
    name: str,
    config: dict[str, Any],
    steps: int | None,
    *,
    start: int = 0,
    timesteps: list[float] | None = None,
    sigmas: list[float] | None = None,
    exact: bool = False,
    together: bool = False,
) -> float:
    """Largest error over all steps, as a share of the one that is allowed.

    ``exact``: diffusers works its factors out in float64, from the same noise levels. In float32 it takes differences
    of logarithms, which alone are off by more than the tolerance where steps are short.
    ``together``: each step starts from diffusers' latents, so that the roundings of both sides do not add up.
    """
    eta = {"eta": config["eta"]} if "eta" in config else {}
    reference = CLASSES[name](**{key: value for key, value in config.items() if key != "eta"})
    if config.get("rescale_betas_zero_snr"):
        # PyTorch's float32 square root may be the last digit off, and the small sigmas then 1e-3: the table has a test.
        table = SchedulerConfig.from_json(config, settings=["rescale_betas_zero_snr"]).alphas_cumprod()
        if hasattr(reference, "sigmas"):
            table[-1] = 2.0**-24
        reference.alphas_cumprod = torch.from_numpy(table)
    if steps is not None:
        reference.set_timesteps(steps)
    else:
        reference.set_timesteps(**({"sigmas": sigmas} if timesteps is None else {"timesteps": timesteps}))
    if hasattr(reference, "set_begin_index"):
        # Else it looks the first timestep up, and begins with the second step where two have the same.
        reference.set_begin_index(start)
    solver = create_solver(
        None, {"_class_name": CLASSES[name].__name__, **config}, steps, timesteps=timesteps, sigmas=sigmas
    )
    # For this one diffusers subtracts squares in float32 that are all but equal, and looks up what is left.
    places = 1e-2 if name == "dpm2-a" else 2e-3
    np.testing.assert_allclose(solver.timesteps, reference.timesteps.numpy(), rtol=1e-6, atol=places)
    assert solver.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma), rel=1e-6)
    for table in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"):
        if exact and hasattr(reference, table):
            setattr(reference, table, getattr(reference, table).double())
    REFERENCE_NOISE[0] = Noise()
    return _run(solver, reference, start, eta, together)


def _run(solver: Solver, reference: Any, start: int, options: dict[str, Any], together: bool) -> float:
    rng = np.random.default_rng(5)
    latents = rng.standard_normal(SHAPE, np.float32) * np.float32(solver.init_noise_sigma)
    if start:
        latents = solver.add_noise(
            rng.standard_normal(SHAPE, np.float32), rng.standard_normal(SHAPE, np.float32), start
        )
    expected = torch.from_numpy(latents.copy())[None]
    rounding = ROUNDINGS if max(map(solver.noise_level, range(len(solver)))) > HUGE else 0.0
    state, given, drawn = solver.new_state(SHAPE), np.empty_like(latents), Noise()
    worst = allowed = largest = 0.0
    for index in range(start, len(solver)):
        if together:
            latents[:] = expected[0].numpy()
        timestep = reference.timesteps[index]
        solver.scale_model_input(latents, index, given)
        wanted = reference.scale_model_input(expected, timestep)[0].numpy()
        np.testing.assert_allclose(given, wanted, rtol=0, atol=allowed + TOLERANCE * max(1, np.abs(wanted).max()))
        # A model that answers to its input, as a UNet does, or errors would not be carried along.
        output = 0.4 * given + rng.standard_normal(SHAPE).astype(np.float32) * np.float32(0.3)
        largest = max(largest, float(expected.abs().max()))
        solver.step(state, index, output, latents, drawn)
        expected = reference.step(torch.from_numpy(output)[None], timestep, expected, **options).prev_sample
        assert torch.isfinite(expected).all()
        allowed = TOLERANCE * max(1.0, float(expected.abs().max())) + rounding * largest
        worst = max(worst, float(np.abs(latents - expected[0].numpy()).max()) / allowed)
    return worst


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers(name: str, steps: int, prediction_type: str, timestep_spacing: str) -> None:
    if prediction_type == "sample" and name in NO_SAMPLE:
        pytest.skip("diffusers has no such prediction here")
    if (name, steps, timestep_spacing) == ("dpm2-a", 2, "linspace"):
        pytest.skip("one step over the whole range: diffusers' difference of squares in float32 has no digits left")
    config = {
        **STABLE_DIFFUSION,
        **ALWAYS.get(name, {}),
        "prediction_type": prediction_type,
        "timestep_spacing": timestep_spacing,
        "steps_offset": 1 if timestep_spacing == "leading" else 0,
    }
    assert compare(name, config, steps, exact=name == "deis" and steps == 50) <= 1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_equals_diffusers_over_all_training_steps(name: str) -> None:
    config = {
        **STABLE_DIFFUSION,
        **ALWAYS.get(name, {}),
        **({"original_inference_steps": 1000} if name in ("lcm", "tcd") else {}),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    assert compare(name, config, 1000, exact=True, together=True) <= 1


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
                {"thresholding": True, "sample_max_value": 2.0},
                ZERO_SNR,
            )
        ),
    ],
)
def test_options_equal_diffusers(name: str, options: dict[str, Any]) -> None:
    assert compare(name, {**STABLE_DIFFUSION, **options}, 12) <= 1


@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "sde-dpmsolver"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver_type": "heun"},
        {"solver_order": 1},
        {"solver_order": 3},
        {"thresholding": True},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_first_dpm_solvers_equal_diffusers(algorithm_type: str, options: dict[str, Any]) -> None:
    if options.get("solver_order") == 3 and algorithm_type == "sde-dpmsolver":
        pytest.skip("diffusers has no third order here")
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
    np.testing.assert_allclose(levels, published[f"{table}Sigmas"][:-1], rtol=1e-12)
    # The published timesteps are whole, and the sigmas have three decimals.
    np.testing.assert_allclose(solver.timesteps, published[f"{table}Timesteps"], atol=1)
    multistep = create_solver("dpmpp-2m", {**STABLE_DIFFUSION, "sigma_spacing": spacing}, 10)
    np.testing.assert_allclose(multistep.timesteps, published[f"{table}Timesteps"], atol=1)


def test_align_your_steps_between_the_published_numbers_of_steps() -> None:
    solver = create_solver("euler", {**STABLE_DIFFUSION, "sigma_spacing": "ays-sd1"}, 20)
    levels = [solver.noise_level(index) for index in range(20)]
    ten = diffusers.schedulers.AysSchedules["StableDiffusionSigmas"][:-1]
    np.testing.assert_allclose(levels[::2], ten, rtol=1e-12)
    np.testing.assert_allclose(levels[1:-1:2], np.sqrt(np.multiply(ten[1:], ten[:-1])), rtol=1e-12)


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
