"""DEIS, exponential integrators in log-rho; Zhang & Chen 2022 (arXiv 2204.13902), section 3.3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.polynomial import polynomial

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers.config import SchedulerConfig
from calotype.runtime.schedulers.multistep import Extrapolation, Multistep, Update, level
from calotype.runtime.schedulers.spacing import Levels, Steps


class DEIS(Extrapolation):
    """The noise predictions of up to three steps, as a polynomial in log sigma that is integrated over sigma."""

    defaults: ClassVar[Mapping[str, Any]] = {**Multistep.defaults, "final_sigmas_type": "sigma_min"}
    predicts_noise = True
    ends_as_spaced = True

    def __init__(self, config: SchedulerConfig, steps: Steps) -> None:
        super().__init__(config, steps)
        sigmas = self._set_schedule(steps)
        if sigmas[-1] == 0:
            raise InputError("deis cannot reach sigma 0; end the list of sigmas with a small one, such as 0.03")
        self._set_updates(sigmas, lowered_at_end=False)

    def _update(self, sigmas: list[float]) -> Update:
        alpha, alpha_now = level(sigmas[0])[0], level(sigmas[1])[0]
        following, now, *past = (math.log(sigma) for sigma in sigmas)
        known = np.array([now, *past]) - now
        shares = [_integral(np.delete(known, place), at, following - now) for place, at in enumerate(known.tolist())]
        weights = tuple(alpha * sigmas[1] * share for share in shares)
        return Update(keep=alpha / alpha_now, weights=weights)


def _integral(others: Levels, own: float, end: float) -> float:
    """∫ p(u) eᵘ du from 0 to ``end``, where p is the polynomial that is 1 at ``own`` and 0 at ``others``."""
    p = polynomial.polyfromroots(others) / np.prod(own - others)
    # The derivative of q·eᵘ is p·eᵘ where q = p - p' + p''.
    q = p
    for order, sign in ((1, -1), (2, 1)):
        q = polynomial.polyadd(q, sign * polynomial.polyder(p, order))
    return float(math.exp(end) * polynomial.polyval(end, q) - polynomial.polyval(0.0, q))
