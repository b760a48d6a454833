"""UniPC, a predictor and corrector of one order; Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 and 2."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.multistep import Multistep, distinct, level
from calotype.runtime.schedulers.solver import Array, NoiseSource, State, add_scaled
from calotype.runtime.schedulers.spacing import Levels, Steps


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """Factors: start·keep + prediction at the end·ahead + predictions from the start on, newest first,·weights."""

    keep: float
    ahead: float
    weights: tuple[float, ...]


class UniPC(Multistep):
    """The prediction at the new latents also corrects the step that led there, at no further evaluation."""

    settings: ClassVar[frozenset[str]] = Multistep.settings | {
        "disable_corrector",
        "final_sigmas_type",
        "predict_x0",
        "rescale_betas_zero_snr",
        "sigma_max",
        "sigma_min",
    }

    ends_as_spaced = True

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        self.memory = config.solver_order
        sigmas = self._set_schedule(steps)
        if not config.predict_x0 and sigmas[-1] == 0:
            raise InputError("predict_x0=False cannot reach sigma 0; set final_sigmas_type to 'sigma_min'")
        count = len(sigmas) - 1
        # For each index and each order; the corrector at an index is of the order that led there.
        self._predictors: list[list[Combination]] = []
        self._correctors: list[list[Combination]] = [[]]
        for index in range(count):
            highest = min(config.solver_order, index + 1)
            if config.lower_order_final:
                highest = min(highest, count - index)
            if sigmas[index + 1] == 0:
                highest = 1  # of an infinite step in λ there is no share
            known = [distinct(sigmas[: index + 2], order) for order in range(1, highest + 1)]
            self._predictors.append([self._combine(levels, corrects=False) for levels in known])
            self._correctors.append([self._combine(levels, corrects=True) for levels in known if levels[0] > 0])

    def step(self, state: State, index: int, noise_pred: Array, latents: Array, rng: NoiseSource) -> None:
        """See :meth:`Solver.step`."""
        predict = self._to_denoised if self.config.predict_x0 else self._to_noise
        prediction = predict(state, index, noise_pred, latents)
        if state.steps > 0 and index - 1 not in self.config.disable_corrector:
            correctors = self._correctors[index]
            corrector = correctors[min(state.steps, len(correctors)) - 1]
            state.saved *= corrector.keep
            add_scaled(state.saved, prediction, corrector.ahead, state.scratch)
            for past, weight in zip(state.history, corrector.weights, strict=False):
                add_scaled(state.saved, past, weight, state.scratch)
        else:
            np.copyto(state.saved, latents)
        state.history.insert(0, prediction)
        state.estimate = state.history.pop()
        predictors = self._predictors[index]
        predictor = predictors[min(state.steps + 1, len(predictors)) - 1]
        np.multiply(state.saved, predictor.keep, out=latents)
        for past, weight in zip(state.history, predictor.weights, strict=False):
            add_scaled(latents, past, weight, state.scratch)
        state.steps += 1

    def _combine(self, sigmas: list[float], *, corrects: bool) -> Combination:
        """From the noise levels at the end, at the start and before, in this order."""
        alpha, sigma, end = level(sigmas[0])
        alpha_now, sigma_now, start = level(sigmas[1])
        # Of the clean latents the exponent is that of the noise's share, of the noise that of the signal's.
        keep, scale, step = sigma / sigma_now, alpha, start - end
        if not self.config.predict_x0:
            keep, scale, step = alpha / alpha_now, sigma, end - start
        first = math.expm1(step)
        places = np.array([(level(past)[2] - start) / (end - start) for past in sigmas[2:]])
        bound = step if self.config.solver_type == "bh1" else first
        ahead, slopes = 0.0, np.empty(0)
        if corrects:
            *rest, ahead = _solve(np.append(places, 1.0), step, bound) if places.size else [0.5]
            slopes = np.array(rest) / places
        elif places.size:
            # The authors' own code takes the limit of short steps for order 2, and diffusers after it.
            slopes = np.array(_solve(places, step, bound) if places.size > 1 else [0.5]) / places
        gain = -scale * bound if ahead or slopes.size else 0.0
        base = -scale * first - gain * (float(slopes.sum()) + ahead)
        return Combination(keep=keep, ahead=gain * ahead, weights=(base, *(gain * slopes).tolist()))


def _solve(places: Levels, step: float, bound: float) -> list[float]:
    """Coefficients that are exact for polynomials up to the number of ``places``: equation 10."""
    moments = []
    moment, factorial = math.expm1(step) / step - 1, 1
    for order in range(1, len(places) + 1):
        moments.append(moment * factorial / bound)
        factorial *= order + 1
        moment = moment / step - 1 / factorial
    solution: list[float] = np.linalg.solve(np.vander(places, increasing=True).T, np.array(moments)).tolist()
    return solution
