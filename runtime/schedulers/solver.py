"""What every scheduler shares: immutable tables, and a step that works in place on one job's latents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.spacing import Steps

Array = NDArray[np.float32]


class NoiseSource(Protocol):
    """The part of ``numpy.random.Generator`` that a stochastic step uses."""

    def standard_normal(self, *, dtype: Any, out: Array) -> Any:
        """Fill ``out``."""


class State:
    """One job's history and scratch space, allocated once.

    Attributes:
        estimate: what the step at hand makes of the model's output: the clean latents, for most solvers.
        saved: latents that a later stage starts from again.
        history: predictions of the last steps, newest first.
        steps: model evaluations so far.
    """

    def __init__(self, shape: tuple[int, ...], memory: int) -> None:
        self.estimate = np.zeros(shape, np.float32)
        self.saved = np.zeros(shape, np.float32)
        self.scratch = np.zeros(shape, np.float32)
        self.history = [np.zeros(shape, np.float32) for _ in range(memory)]
        self.steps = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A step as factors: next = latents·… + noise_pred·… + clipped denoised·… + new normal noise·deviation."""

    latents: float
    noise_pred: float = 0.0
    denoised: float = 0.0
    deviation: float = 0.0

    def folded(self, a: float, b: float) -> Move:
        """The same where denoised = a·latents + b·noise_pred, without clipping."""
        return Move(
            latents=self.latents + self.denoised * a,
            noise_pred=self.noise_pred + self.denoised * b,
            deviation=self.deviation,
        )


class Solver:
    """A scheduler at one number of steps. ``step`` changes no attribute, so jobs may share a solver.

    Attributes:
        defaults: what the solver's class in diffusers takes where the JSON is silent.
        settings: the names that class has beside the common ones; it ignores others.
        custom: which of "timesteps" and "sigmas" a caller may choose.
        memory: predictions that a job's history holds.
        evaluations_per_step: model evaluations of a step; the last step may need fewer.
        timesteps: (evaluations,) float32, what the UNet is given at each index.
        init_noise_sigma: the standard deviation of the first latents.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    settings: ClassVar[frozenset[str]] = frozenset()
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    evaluations_per_step: ClassVar[int] = 1
    memory: int = 0

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        self.config = config
        self.num_inference_steps = steps.count
        self.init_noise_sigma = 1.0
        self.timesteps: Array = np.empty(0, np.float32)
        # For each index: latents = signal * clean + sigma * noise, and denoised = a * latents + b * noise_pred
        self._levels: list[tuple[float, float]] = []
        self._denoise: list[tuple[float, float]] = []
        self._moves: list[Move] = []

    def __len__(self) -> int:
        """Model evaluations in a whole run."""
        return len(self.timesteps)

    def new_state(self, shape: tuple[int, ...]) -> State:
        """History and scratch space for latents of ``shape``."""
        return State(shape, self.memory)

    def start_index(self, strength: float) -> int:
        """The first index of an image-to-image run: ``strength`` is the share of the steps that are taken, 0 to 1.

        Raises:
            InputError: when it is outside.
        """
        if not 0 <= strength <= 1:
            raise InputError(f"strength={strength} is outside 0..1")
        steps = self.num_inference_steps
        taken = min(int(steps * strength), steps)
        return len(self) if taken == 0 else (steps - taken) * self.evaluations_per_step

    def step_ends(self, start: int) -> tuple[int, ...]:
        """The indices at which the steps of a run that begins at index ``start`` are done, one for each step."""
        each = self.evaluations_per_step
        return tuple(min(index + each, len(self)) for index in range(start, len(self), each))

    def add_noise(self, clean: Array, noise: Array, index: int, out: Array | None = None) -> Array:
        """Latents as they stand before ``index``, in ``out`` or anew, from clean ones and noise of unit variance."""
        signal, sigma = self._levels[index]
        noisy: Array = np.multiply(clean, signal / sigma, out=out)
        noisy += noise
        noisy *= sigma
        return noisy

    def noise_level(self, index: int) -> float:
        """Sigma, noise over signal, at ``index``."""
        signal, sigma = self._levels[index]
        return sigma / signal if signal > 0 else math.inf

    def signal_share(self, index: int) -> float:
        """What latents of unit signal at ``index`` are multiplied by for the best linear guess of it; Wiener 1949."""
        signal, sigma = self._levels[index]
        return signal / (signal**2 + sigma**2)

    def scale_model_input(self, latents: Array, index: int, out: Array) -> None:
        """Write what the UNet is given at ``index`` into ``out``, (C, h, w), or each row of (rows, C, h, w)."""
        np.copyto(out, latents)

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """Move ``latents`` in place from ``index`` to the next; all arrays float32 of one shape.

        A one-step solver is its table of moves; others have a step of their own.
        """
        move = self._moves[index]
        if move.denoised != 0:
            self._to_denoised(state, index, noise_pred, latents)
        if move.latents != 1:
            latents *= move.latents
        if move.noise_pred != 0:
            add_scaled(latents, noise_pred, move.noise_pred, state.scratch)
        if move.denoised != 0:
            add_scaled(latents, state.estimate, move.denoised, state.scratch)
        add_drawn(latents, move.deviation, rng, state.scratch)

    def _set_moves(self, moves: Iterable[Move]) -> None:
        """The table of a one-step solver; what is not clipped needs no array of its own."""
        self._moves = list(moves)
        if not (self.config.thresholding or self.config.clip_sample):
            self._moves = [move.folded(*pair) for move, pair in zip(self._moves, self._denoise, strict=True)]

    def _set_levels(self, signal: NDArray[np.float64], noise: NDArray[np.float64]) -> None:
        """Tables of ``_levels`` and ``_denoise`` for each index, from (evaluations,) arrays."""
        self._levels = list(zip(signal.tolist(), noise.tolist(), strict=True))
        self._denoise = [_denoising(*level, self.config.prediction_type) for level in self._levels]

    def _to_denoised(self, state: State, index: int, noise_pred: Array, latents: Array) -> Array:
        """The prediction of the clean latents, clipped as the settings say, in ``state.estimate``."""
        estimate = state.estimate
        a, b = self._denoise[index]
        np.multiply(noise_pred, b, out=estimate)
        if a != 0:
            add_scaled(estimate, latents, a, state.scratch)
        if self.config.thresholding:
            _threshold(estimate, state.scratch, self.config)
        elif self.config.clip_sample:
            np.clip(estimate, -self.config.clip_sample_range, self.config.clip_sample_range, out=estimate)
        return estimate


def add_scaled(target: Array, array: Array, factor: float, scratch: Array) -> None:
    """``target += factor * array`` without allocating."""
    np.multiply(array, factor, out=scratch)
    target += scratch


def add_drawn(target: Array, deviation: float, rng: NoiseSource, scratch: Array) -> None:
    """Add normal numbers; none are drawn where ``deviation`` is 0."""
    if deviation > 0:
        rng.standard_normal(dtype=np.float32, out=scratch)
        scratch *= deviation
        target += scratch


def remember(history: list[Array], prediction: Array) -> None:
    """Copy ``prediction`` to the front of ``history``; the oldest falls out."""
    history.insert(0, history.pop())
    np.copyto(history[0], prediction)


def lookup(table: Array, timesteps: Iterable[int], final: float) -> NDArray[np.float64]:
    """ᾱ from the table at ``timesteps``, and ``final`` at negative ones."""
    return np.array([float(table[t]) if t >= 0 else final for t in timesteps])


def _denoising(signal: float, noise: float, prediction_type: str) -> tuple[float, float]:
    """Factors of latents and model output in the clean latents where latents = signal·clean + noise·noise."""
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        # v = (signal·noise - noise·clean) / √(signal² + noise²)
        power = signal**2 + noise**2
        return signal / power, -noise / math.sqrt(power)
    if signal == 0:
        raise InputError("rescale_betas_zero_snr leaves no signal to divide by; it needs v_prediction or sample")
    return 1 / signal, -noise / signal


def _threshold(denoised: Array, scratch: Array, config: SchedulerConfig) -> None:
    """Dynamic thresholding, in place; Saharia et al. 2022 (arXiv 2205.11487), section 2.3."""
    np.abs(denoised, out=scratch)
    flat = scratch.reshape(-1)
    rank = config.dynamic_thresholding_ratio * (flat.size - 1)
    below = int(rank)
    above = min(below + 1, flat.size - 1)
    flat.partition((below, above))
    quantile = float(flat[below]) + (float(flat[above]) - float(flat[below])) * (rank - below)
    limit = min(max(quantile, 1.0), config.sample_max_value)
    np.clip(denoised, -limit, limit, out=denoised)
    denoised /= limit
