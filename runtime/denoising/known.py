"""The part of a picture's latents that is given, where a mask says what is drawn.

Lugmayr et al. 2022, "RePaint" (arXiv 2201.09865), without its resampling: what is given is noised anew at every step.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arrays import Array
from calotype.runtime.schedulers import Solver


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """The given part of a job's latents.

    Attributes:
        clean: (C, h, w) float32, the picture's latents.
        noise: (C, h, w) float32 of unit variance, the job's first noise.
        keep: (h, w) bool, where they are given.
        scratch: (C, h, w) float32, room to compute in.
    """

    clean: Array
    noise: Array
    keep: NDArray[np.bool_]
    scratch: Array

    def restore(self, latents: Array, solver: Solver, index: int) -> None:
        """Overwrite the known part of ``latents`` (C, h, w) as it stands before evaluation ``index``, or at the end."""
        at_end = index >= len(solver)
        known = self.clean if at_end else solver.add_noise(self.clean, self.noise, index, out=self.scratch)
        np.copyto(latents, known, where=self.keep)
