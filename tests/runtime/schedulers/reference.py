"""A solver and diffusers' scheduler of the same name, run side by side."""

from __future__ import annotations

import importlib
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest

from calotype.runtime.schedulers import SchedulerConfig, Solver, create_solver

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch

# Of the largest magnitude in the latents, or of 1 where that is less. Where latents are clean + sigma·noise they are as
# large as sigma, and where a random model's errors are divided by a small signal they grow likewise: float32 resolves
# 6e-8 of either, and both sides round every step.
TOLERANCE = 1e-5
# Over a whole run a sigma of thousands (zero terminal SNR, cosine betas) leaves its rounding errors in latents that
# shrink: there two of them are allowed besides, of the largest latents so far. A single step is allowed none. Epsilon
# is no use there: it is divided by a signal of 1e-4.
ROUNDINGS = 2 * 2.0**-24
HUGE = 1000
LAST_DIGIT = 2.0**-23  # of a float32
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
NO_SAMPLE = {"dpm2", "dpm2-a", "euler-a", "pndm"}  # diffusers' classes that do not know this prediction
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (4, 8, 8)


class Noise:
    """The same normal numbers for both sides, in the order of the steps."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(11)

    def standard_normal(self, *, dtype: Any, out: np.ndarray) -> None:
        out[:] = self._rng.standard_normal(out.shape).astype(dtype)


def compare(
    name: str,
    config: dict[str, Any],
    steps: int | None,
    *,
    start: int = 0,
    timesteps: list[float] | None = None,
    sigmas: list[float] | None = None,
    exact: bool = False,
) -> float:
    """Largest error over all steps, as a share of the one that is allowed.

    By default the two run side by side in float32, diffusers as it stands. ``exact``: each step is compared alone, from
    the same float32 latents and noise levels, with diffusers in float64. In float32 diffusers takes differences of
    logarithms and of squares, which alone are off by more than the tolerance where steps are short, or very long.
    """
    eta = {"eta": config["eta"]} if "eta" in config else {}
    reference = _reference(name, config, steps, timesteps, sigmas, exact)
    if hasattr(reference, "set_begin_index"):
        # Else it looks the first timestep up, and begins with the second step where two have the same.
        reference.set_begin_index(start)
    solver = create_solver(
        None, {"_class_name": CLASSES[name].__name__, **config}, steps, timesteps=timesteps, sigmas=sigmas
    )
    if solver.config.prediction_type == "sample" and name in NO_SAMPLE:
        _take_sample(reference, solver)
    # For this one diffusers subtracts squares in float32 that are all but equal, and looks up what is left.
    places = 1e-2 if name == "dpm2-a" else 2e-3
    apart = np.abs(solver.timesteps - reference.timesteps.numpy())
    # One that is cut just below a whole number may lie just above it by the last digit of PyTorch's square root.
    cut = config.get("use_exponential_sigmas") or config.get("use_beta_sigmas")
    assert np.sum(apart > places) <= (1 if cut else 0) and apart.max() <= (1 if cut else places)
    assert solver.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma), rel=1e-6)
    if exact and len(getattr(reference, "sigmas", ())) == len(solver) + 1:
        # PyTorch's square root may be a last digit off, which at 1000 steps is 1e-5 of the distance to the next level.
        levels = np.array([solver.noise_level(index) for index in range(len(solver))], np.float32)
        np.testing.assert_allclose(reference.sigmas[:-1], levels, rtol=LAST_DIGIT)
        ends_where_it_is = abs(float(reference.sigmas[-1]) / levels[-1] - 1) <= LAST_DIGIT
        reference.sigmas[:-1] = torch.from_numpy(levels)
        if ends_where_it_is:
            reference.sigmas[-1] = reference.sigmas[-2]
    drawn = Noise()

    def randn(shape: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        out = np.empty(tuple(shape), np.float32)
        drawn.standard_normal(dtype=np.float32, out=out)
        return torch.from_numpy(out).to(dtype)

    module = importlib.import_module(CLASSES[name].__module__)
    with mock.patch.object(module, "randn_tensor", randn, create=True):
        return _run(solver, reference, start, eta, exact)


def _reference(
    name: str,
    config: dict[str, Any],
    steps: int | None,
    timesteps: list[float] | None,
    sigmas: list[float] | None,
    exact: bool,
) -> Any:
    """Diffusers' scheduler with its timesteps set; ``exact``: with all that it works out of them in float64."""
    known = {key: value for key, value in config.items() if key != "eta"}
    if name in NO_SAMPLE and known.get("prediction_type") == "sample":
        known["prediction_type"] = "epsilon"  # see _take_sample
    reference = CLASSES[name](**known)
    if config.get("rescale_betas_zero_snr"):
        # PyTorch's float32 square root may be the last digit off, and the small sigmas then 1e-3: the table has a test.
        table = SchedulerConfig.from_json(config, settings=["rescale_betas_zero_snr"]).alphas_cumprod()
        if hasattr(reference, "sigmas"):
            table[-1] = 2.0**-24
        reference.alphas_cumprod = torch.from_numpy(table)
    chosen = {"num_inference_steps": steps, "timesteps": timesteps, "sigmas": sigmas}
    narrow = torch.from_numpy

    def wide(array: np.ndarray) -> torch.Tensor:
        tensor = narrow(array)
        return tensor.double() if tensor.is_floating_point() else tensor

    # The noise levels pass through here, rounded to float32, before anything is worked out of them.
    with mock.patch.object(torch, "from_numpy", wide if exact else narrow):
        reference.set_timesteps(**{key: value for key, value in chosen.items() if value is not None})
    for table in ("alphas_cumprod", "sigmas"):
        if exact and hasattr(reference, table):
            setattr(reference, table, getattr(reference, table).double())
    return reference


def _take_sample(reference: Any, solver: Solver) -> None:
    """Let a class that only knows epsilon take predictions of the clean latents."""
    if isinstance(reference, diffusers.PNDMScheduler):
        transfer = reference._get_prev_sample

        def of_sample(latents: torch.Tensor, timestep: int, following: int, clean: torch.Tensor) -> torch.Tensor:
            alpha = reference.alphas_cumprod[timestep]
            return transfer(latents, timestep, following, (latents - alpha**0.5 * clean) / (1 - alpha) ** 0.5)

        reference._get_prev_sample = of_sample
    else:
        step = reference.step

        def with_sample(clean: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> Any:
            return step((latents - clean) / solver.noise_level(reference.step_index), timestep, latents)

        reference.step = with_sample


def _run(solver: Solver, reference: Any, start: int, options: dict[str, Any], exact: bool) -> float:
    rng = np.random.default_rng(5)
    latents = rng.standard_normal(SHAPE, np.float32) * np.float32(solver.init_noise_sigma)
    if start:
        latents = solver.add_noise(
            rng.standard_normal(SHAPE, np.float32), rng.standard_normal(SHAPE, np.float32), start
        )
    dtype = torch.float64 if exact else torch.float32
    expected = torch.from_numpy(latents.copy())[None].to(dtype)
    huge = not exact and max(map(solver.noise_level, range(len(solver)))) > HUGE
    state, given, drawn = solver.new_state(SHAPE), np.empty_like(latents), Noise()
    worst = allowed = largest = 0.0
    for index in range(start, len(solver)):
        if exact:
            latents[:] = expected[0].numpy()
            expected = torch.from_numpy(latents.copy())[None].to(dtype)
        timestep = reference.timesteps[index]
        solver.scale_model_input(latents, index, given)
        wanted = reference.scale_model_input(expected, timestep)[0].numpy()
        assert np.abs(given - wanted).max() <= allowed + TOLERANCE * max(1, np.abs(wanted).max())
        # A model that answers to its input, as a UNet does, or errors would not be carried along.
        output = 0.4 * given + rng.standard_normal(SHAPE).astype(np.float32) * np.float32(0.3)
        largest = max(largest, float(expected.abs().max()))
        solver.step(state, index, output, latents, drawn)
        before, answer = expected, torch.from_numpy(output)[None].to(dtype)
        expected = reference.step(answer, timestep, before, **options).prev_sample
        if not torch.isfinite(expected).all():
            # Diffusers divides by the length of a step where it is none: such a step changes nothing, but that UniPC
            # corrects the one before, and keeps what its predictor would have begun with.
            assert reference.sigmas[index] == reference.sigmas[index + 1]
            assert index == len(solver) - 1
            expected = before if getattr(reference, "last_sample", None) is None else reference.last_sample
        allowed = TOLERANCE * max(1.0, float(expected.abs().max())) + (ROUNDINGS * largest if huge else 0.0)
        worst = max(worst, float(np.abs(latents - expected[0].numpy()).max()) / allowed)
    return worst
