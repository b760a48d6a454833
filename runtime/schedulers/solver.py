"""What every scheduler shares: immutable tables, and a step that works in place on one job's latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig

Array = NDArray[np.float32]


class NoiseSource(Protocol):
    """The part of ``numpy.random.Generator`` that a stochastic step uses."""

    def standard_normal(self, *, dtype: Any, out: Array) -> Any:
        """Fill ``out``."""


class State:
    """One job's history and scratch space, allocated once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.denoised = np.zeros(shape, np.float32)
        self.previous = np.zeros(shape, np.float32)
        self.scratch = np.zeros(shape, np.float32)
        self.steps = 0


class Solver:
    """A scheduler at one number of steps. ``step`` changes no attribute, so jobs may share a solver.

    Attributes:
        timesteps: (evaluations,) float32, what the UNet is given at each index.
        init_noise_sigma: the standard deviation of the first latents.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: SchedulerConfig, num_inference_steps: int) -> None:
        if not 1 <= num_inference_steps <= config.num_train_timesteps:
            raise InputError(
                f"num_inference_steps={num_inference_steps} is outside 1..{config.num_train_timesteps}; "
                "20 is a good start"
            )
        self.config = config
        self.init_noise_sigma = 1.0
        self.timesteps: Array = np.empty(0, np.float32)
        # denoised = a * sample + b * model_output, for each index
        self._denoise: list[tuple[float, float]] = []

    def __len__(self) -> int:
        """Model evaluations in a whole run."""
        return len(self.timesteps)

    def new_state(self, shape: tuple[int, ...]) -> State:
        """History and scratch space for latents of ``shape``."""
        return State(shape)

    def scale_model_input(self, sample: Array, index: int, out: Array) -> None:
        """Write what the UNet is given at ``index`` into ``out``; both float32 of one shape."""
        np.copyto(out, sample)

    def step(self, state: State, index: int, model_output: Array, sample: Array, rng: NoiseSource) -> None:
        """Move ``sample`` in place from ``index`` to the next; all arrays float32 of one shape."""
        raise NotImplementedError

    def _to_denoised(self, state: State, index: int, model_output: Array, sample: Array) -> Array:
        """The prediction of the clean latents, in ``state.denoised``."""
        a, b = self._denoise[index]
        np.multiply(sample, a, out=state.denoised)
        np.multiply(model_output, b, out=state.scratch)
        state.denoised += state.scratch
        return state.denoised


def variance_preserving(alphas: NDArray[np.float64], prediction_type: str) -> list[tuple[float, float]]:
    """Factors of sample and model output in the clean latents where sample = √ᾱ·clean + √(1-ᾱ)·noise."""
    signal, noise = np.sqrt(alphas), np.sqrt(1 - alphas)
    if prediction_type == "epsilon":
        if not signal.all():
            raise InputError("rescale_betas_zero_snr leaves no signal to divide by; it needs v_prediction or sample")
        pairs = (1 / signal, -noise / signal)
    elif prediction_type == "v_prediction":
        pairs = (signal, -noise)
    else:
        pairs = (np.zeros_like(signal), np.ones_like(signal))
    return [(float(a), float(b)) for a, b in zip(*pairs, strict=True)]


def variance_exploding(sigmas: NDArray[np.float64], prediction_type: str) -> list[tuple[float, float]]:
    """The same where sample = clean + sigma·noise."""
    if prediction_type == "epsilon":
        pairs = (np.ones_like(sigmas), -sigmas)
    elif prediction_type == "v_prediction":
        pairs = (1 / (sigmas**2 + 1), -sigmas / np.sqrt(sigmas**2 + 1))
    else:
        pairs = (np.zeros_like(sigmas), np.ones_like(sigmas))
    return [(float(a), float(b)) for a, b in zip(*pairs, strict=True)]
