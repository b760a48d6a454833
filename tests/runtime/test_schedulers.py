"""Every solver against diffusers' scheduler of the same name, step by step."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import SCHEDULERS, SchedulerConfig, create_solver

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch

TOLERANCE = 1e-5  # of the largest magnitude in the latents, float32
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
}
NOISE_SEED = 11


class Noise:
    """The same normal numbers for both sides, in the order of the steps."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(NOISE_SEED)

    def standard_normal(self, *, dtype: Any, out: np.ndarray) -> None:
        out[:] = self._rng.standard_normal(out.shape).astype(dtype)


def compare(name: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest error over all steps, relative to the latents' largest magnitude."""
    reference = CLASSES[name](**config)
    if name in ("euler", "dpmpp-2m"):
        # Diffusers keeps this table in float32; its rounding moves the smallest sigma by 1.3e-5, more than the
        # tolerance. The table itself is compared in a test of its own.
        reference.alphas_cumprod = torch.from_numpy(SchedulerConfig.from_json(config).alphas_cumprod())
    reference.set_timesteps(steps)
    solver = create_solver(name, config, steps)
    np.testing.assert_allclose(solver.timesteps, reference.timesteps.numpy(), rtol=1e-6, atol=1e-4)
    assert solver.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma), rel=1e-6)
    noise = Noise()

    def randn(shape: Any, **_: Any) -> torch.Tensor:
        out = np.empty(tuple(shape), np.float32)
        noise.standard_normal(dtype=np.float32, out=out)
        return torch.from_numpy(out)

    module = __import__(CLASSES[name].__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", randn, raising=False)
    rng = np.random.default_rng(5)
    sample = rng.standard_normal((4, 8, 8), np.float32) * np.float32(solver.init_noise_sigma)
    expected = torch.from_numpy(sample.copy())[None]
    state, given, worst = solver.new_state(sample.shape), np.empty_like(sample), 0.0
    ours = Noise()
    for index in range(len(solver)):
        timestep = reference.timesteps[index]
        solver.scale_model_input(sample, index, given)
        wanted = reference.scale_model_input(expected, timestep)
        np.testing.assert_allclose(given, wanted[0].numpy(), rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        # A model that answers to its input, as a UNet does, or errors would not be carried along.
        output = 0.4 * given + rng.standard_normal(sample.shape).astype(np.float32) * np.float32(0.3)
        solver.step(state, index, output, sample, ours)
        expected = reference.step(torch.from_numpy(output)[None], timestep, expected).prev_sample
        assert torch.isfinite(expected).all()
        worst = max(worst, float(np.abs(sample - expected[0].numpy()).max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers(
    name: str, steps: int, prediction_type: str, timestep_spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction_type,
        "timestep_spacing": timestep_spacing,
        "steps_offset": 1 if timestep_spacing == "leading" else 0,
    }
    assert compare(name, config, steps, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"set_alpha_to_one": False, "clip_sample": False}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0}),
        ("ddim", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("ddpm", {"variance_type": "fixed_large", "clip_sample": False}),
        ("ddpm", {"beta_schedule": "linear", "clip_sample_range": 2.0}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"final_sigmas_type": "sigma_min", "beta_schedule": "linear"}),
        ("dpmpp-2m", {"use_karras_sigmas": True}),
        ("dpmpp-2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp-2m", {"solver_type": "heun"}),
        ("dpmpp-2m", {"solver_order": 1}),
        ("dpmpp-2m", {"euler_at_final": True}),
    ],
)
def test_options_equal_diffusers(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(name, {"beta_schedule": "scaled_linear", **options}, 12, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_noise_tables_equal_diffusers(beta_schedule: str, rescale: bool) -> None:
    config = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": rescale}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    got = SchedulerConfig.from_json(config).alphas_cumprod()
    # A float32 product of 1000 factors: 1000 roundings of 6e-8, that mostly cancel.
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-6 if rescale else 1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=rf"num_inference_steps={steps} is outside 1\.\.1000"):
        create_solver(name, {}, steps)


@pytest.mark.parametrize(
    ("name", "offset", "most"), [("ddim", 0, 1000), ("ddpm", 1, 999), ("euler", 1, 999), ("dpmpp-2m", 1, 998)]
)
def test_more_steps_than_leading_spacing_has_room_for(name: str, offset: int, most: int) -> None:
    # Diffusers raises an IndexError beyond, or repeats timestep 0.
    config = {"timestep_spacing": "leading", "steps_offset": offset}
    reference = CLASSES[name](**config)
    reference.set_timesteps(most)
    solver = create_solver(name, config, most)
    assert solver.timesteps.tolist() == reference.timesteps.tolist()
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
    with pytest.raises(InputError, match="valid: ddim, ddpm, dpmpp-2m, euler"):
        create_solver("dpm-fast", {}, 4)


def test_a_setting_that_would_change_the_picture_is_refused() -> None:
    with pytest.raises(InputError, match=r"prediction_type='flow'.*epsilon, v_prediction, sample"):
        create_solver("ddim", {"prediction_type": "flow"}, 4)
    with pytest.raises(InputError, match="thresholding=True is not supported"):
        create_solver("ddim", {"thresholding": True}, 4)
