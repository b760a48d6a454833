"""The normal numbers that PyTorch draws on a GPU, which stable-diffusion.cpp draws too from a seed.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and Box-Muller's transform.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def normal(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The first draw of that seed, of ``shape``."""
    count = int(np.prod(shape))
    words = np.zeros((4, count), np.uint64)
    words[2] = np.arange(count)
    key = [seed & MASK, seed >> 32]
    for _ in range(ROUNDS):
        first, second = words[0] * np.uint64(MULTIPLIERS[0]), words[2] * np.uint64(MULTIPLIERS[1])
        words = np.stack(
            [
                (second >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]),
                second & np.uint64(MASK),
                (first >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]),
                first & np.uint64(MASK),
            ]
        )
        key = [(part + step) & MASK for part, step in zip(key, WEYL, strict=True)]
    uniform, angle = (words[index].astype(np.float64) / 2**32 + 2**-33 for index in (0, 1))
    radius = np.sqrt(-2 * np.log(uniform))
    return (radius * np.sin(2 * np.pi * angle)).astype(np.float32).reshape(shape)
