"""Flow matching: latents are (1 - σ)·clean + σ·noise, and the model predicts noise - clean.

Lipman et al. 2022 (arXiv 2210.02747); Liu et al. 2022, "Flow Straight and Fast" (arXiv 2209.03003). σ falls from 1 to
0; a shift keeps it high for longer, Esser et al. 2024 (arXiv 2403.03206), section 5.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.solver import Array, Move, NoiseSource, Solver, State, add_scaled
from calotype.runtime.schedulers.spacing import Levels, Steps, respaced_sigmas, rounded


class FlowMatching(Solver):
    """What both have in common; the model is given σ as a timestep, σ · ``num_train_timesteps``."""

    defaults: ClassVar[Mapping[str, Any]] = {"timestep_spacing": "linspace"}
    settings: ClassVar[frozenset[str]] = frozenset({"shift"})
    custom: ClassVar[frozenset[str]] = frozenset({"sigmas"})

    def start_index(self, strength: float) -> int:
        """See :meth:`Solver.start_index`; as diffusers has it for these models, a step begun is a step taken."""
        super().start_index(strength)
        steps = self.num_inference_steps
        skipped = int(max(steps - min(steps * strength, steps), 0))
        return len(self) if skipped == steps else skipped * self.evaluations_per_step

    def _sigmas(self, steps: Steps) -> Levels:
        """Noise levels (count + 1,) with the one that is reached last: usual ones, or chosen ones, both shifted.

        ``timestep_spacing`` says the usual ones before they are shifted: "trailing" from 1 to 1 / count, "linspace"
        from 1 to the least of the training's.
        """
        config, last = self.config, 0.0
        if steps.sigmas is not None:
            if steps.sigmas[0] > 1:
                raise InputError(f"sigmas begin at {steps.sigmas[0]:g}; this model's noise levels are from 1 down to 0")
            sigmas, last = steps.sigmas[:-1], float(self._shifted(steps.sigmas[-1:])[0])
        elif config.timestep_spacing == "trailing":
            sigmas = np.linspace(1, 1 / steps.count, steps.count)
        else:
            least = np.array([1 / config.num_train_timesteps])
            # Where the shift is the checkpoint's own, diffusers takes the least of the levels that are shifted already.
            least = least if config.use_dynamic_shifting else self._shifted(least)
            sigmas = np.linspace(1, float(least[0]), steps.count)
        sigmas = self._shifted(sigmas)
        if config.shift_terminal is not None and sigmas[-1] < 1:
            sigmas = 1 - (1 - sigmas) * (1 - config.shift_terminal) / (1 - sigmas[-1])
        if config.sigma_spacing != "table":
            sigmas = respaced_sigmas(config, steps.count, low=float(sigmas[-1]), high=float(sigmas[0]))
        return rounded(np.append(sigmas, last))

    def _shifted(self, sigmas: Levels) -> Levels:
        config = self.config
        if not config.use_dynamic_shifting:
            static: Levels = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
            return static
        if config.mu is None:
            raise InputError("the scheduler setting use_dynamic_shifting needs mu, which a family makes of the size")
        factor = math.exp(config.mu) if config.time_shift_type == "exponential" else config.mu
        dynamic: Levels = factor * sigmas / (factor * sigmas + 1 - sigmas)
        return dynamic

    def _set_evaluations(self, sigmas: Levels) -> None:
        """What each evaluation is given, (evaluations,)."""
        self.timesteps = (sigmas * self.config.num_train_timesteps).astype(np.float32)
        self._levels = list(zip((1 - sigmas).tolist(), sigmas.tolist(), strict=True))


class FlowEuler(FlowMatching):
    """Straight on to the next σ; with ``stochastic_sampling`` to the clean latents, and back to it with new noise."""

    settings: ClassVar[frozenset[str]] = FlowMatching.settings | {
        "use_dynamic_shifting",
        "time_shift_type",
        "mu",
        "shift_terminal",
        "stochastic_sampling",
        "sigma_spacing",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    }

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        sigmas = self._sigmas(steps)
        self._set_evaluations(sigmas[:-1])
        move = _renoised if config.stochastic_sampling else _straight
        self._moves = [move(now, after) for now, after in pairwise(sigmas.tolist())]


class FlowHeun(FlowMatching):
    """Two slopes a step, averaged; the last step is Euler's alone. Its shift is the checkpoint's own in diffusers."""

    settings: ClassVar[frozenset[str]] = FlowMatching.settings | {"use_dynamic_shifting", "time_shift_type", "mu"}
    evaluations_per_step: ClassVar[int] = 2

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        sigmas = self._sigmas(steps)
        self._set_evaluations(np.repeat(sigmas[:-1], 2)[1:])
        self._lengths = [after - now for now, after in pairwise(sigmas.tolist())]

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        length = self._lengths[index // 2]
        if index % 2 == 0:
            np.copyto(state.saved, latents)
            add_scaled(state.saved, noise_pred, length / 2, state.scratch)
            add_scaled(latents, noise_pred, length, state.scratch)
        else:
            np.copyto(latents, state.saved)
            add_scaled(latents, noise_pred, length / 2, state.scratch)


def _straight(sigma: float, following: float) -> Move:
    return Move(latents=1.0, noise_pred=following - sigma)


def _renoised(sigma: float, following: float) -> Move:
    return Move(latents=1 - following, noise_pred=-(1 - following) * sigma, deviation=following)
