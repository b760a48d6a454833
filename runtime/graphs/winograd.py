"""The numbers of Winograd's minimal filtering (Lavin and Gray 2015, arXiv 1509.09308) for kernels of 3 x 3 pixels.

The graphs that compute with them are made in ``engine/winograd.py``.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# Where polynomials are evaluated, and infinity. Of those tried for m = 4, these round least: half as coarsely as the
# usual 0, 1, -1, 1/2, -2.
POINTS = {2: (0, 1, -1), 4: (0, Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2))}

PIECE = 512  # kernels


def spread(kernel: NDArray[np.float32], m: int) -> NDArray[np.float32]:
    """The weights (1, (m + 2)^2, K, C) for a kernel (K, C, 3, 3); in float64, since it is done once.

    In pieces that stay in the cache, and that BLAS computes in the thread that asks for them.
    """
    _, own, _ = transforms(m)
    both = np.einsum("ij,kl->ikjl", own, own).reshape(-1, 9)
    kernels = kernel.reshape(-1, 9)
    weights = np.empty((len(both), len(kernels)), np.float32)
    for begin in range(0, len(kernels), PIECE):
        part = slice(begin, begin + PIECE)
        weights[:, part] = both @ kernels[part].T.astype(np.float64)
    return weights.reshape(1, len(both), *kernel.shape[:2])


def transforms(m: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of sums back to pixels (m, m + 2), of a kernel (m + 2, 3), of a tile's pixels (m + 2, m + 2); Toom and Cook."""
    points = [Fraction(point) for point in POINTS[m]]
    others = [[other for other in points if other != point] for point in points]
    scale = [math.prod([point - other for other in rest]) for point, rest in zip(points, others, strict=True)]
    back = [[point**power for point in points] + [Fraction(power == m - 1)] for power in range(m)]
    kernel = [[point**power / own for power in range(3)] for point, own in zip(points, scale, strict=True)]
    tile = [[*_polynomial(rest), Fraction(0)] for rest in others]
    whole = (back, [*kernel, [Fraction(power == 2) for power in range(3)]], [*tile, _polynomial(points)])
    back_, kernel_, tile_ = (np.array(item, dtype=np.float64) for item in whole)
    return back_, kernel_, tile_


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Its coefficients, that of the least power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [up - root * own for up, own in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found
