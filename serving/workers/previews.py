"""What a picture will be, seen while it is denoised: a linear map from latents to colours.

The map is fitted by least squares to the model's own finished pictures, each latent to the mean colour of the pixels
that it becomes, so that no family needs a table of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arrays import Array
from calotype.runtime.denoising.job import Job
from calotype.serving.tasks import Pixels

RIDGE = 1e-3  # of the mean square of the latents: few pictures leave directions in which nothing is known
MEMORY = 0.98  # of what was learned, for each picture that follows


class PreviewMap:
    """Latents (C, h, w) to colours (h, w, 3)."""

    def __init__(self) -> None:
        self._squares: NDArray[np.float64] | None = None  # (C + 1, C + 1)
        self._products: NDArray[np.float64] | None = None  # (C + 1, 3)
        self._map: NDArray[np.float64] | None = None  # (C + 1, 3)

    def learn(self, latents: Array, pixels: Pixels) -> None:
        """Take in a finished picture: its latents (C, h, w) and pixels (H, W, 3)."""
        _, height, width = latents.shape
        down, across = pixels.shape[0] // height, pixels.shape[1] // width
        if down < 1 or across < 1:
            return
        cells = pixels[: height * down, : width * across].reshape(height, down, width, across, 3)
        colours = cells.mean(axis=(1, 3), dtype=np.float64).reshape(-1, 3) / 255
        known = _with_one(latents)
        if self._squares is None or self._products is None or len(self._squares) != known.shape[1]:
            self._squares = np.zeros((known.shape[1], known.shape[1]))
            self._products = np.zeros((known.shape[1], 3))
        self._squares = MEMORY * self._squares + known.T @ known / len(known)
        self._products = MEMORY * self._products + known.T @ colours / len(known)
        self._map = None

    def show(self, latents: Array) -> Pixels | None:
        """The picture that denoised ``latents`` (C, h, w) would become, (h, w, 3); None where nothing was learned."""
        if self._squares is None or self._products is None or len(self._squares) != len(latents) + 1:
            return None
        if self._map is None:
            ridge = RIDGE * np.trace(self._squares) / len(self._squares)
            self._map = np.linalg.solve(self._squares + ridge * np.eye(len(self._squares)), self._products)
        colours = (_with_one(latents) @ self._map).reshape(*latents.shape[1:], 3)
        shown: Pixels = (np.nan_to_num(np.clip(colours, 0, 1)) * 255).round().astype(np.uint8)
        return shown


def denoised(job: Job) -> Array:
    """What a job's latents are likely to become, (C, h, w): those of unit variance that the noise in them leaves.

    It is the best linear guess of the signal, which is grey where all is noise and the picture where none is.
    """
    share = 1.0 if job.done else job.solver.signal_share(job.index)
    found: Array = job.latents * np.float32(share)
    return found


def _with_one(latents: Array) -> NDArray[np.float64]:
    """(C, h, w) to (h * w, C + 1): a latent's channels, and one."""
    flat = latents.reshape(len(latents), -1).T.astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
