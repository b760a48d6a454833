"""Weights as eight-bit integers: how they are rounded when an engine is built, and when others take their place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_ROOT_MEAN_SQUARE = 0.1  # of a graph's error in int8, over that of what it predicts in float32


def per_channel(weights: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights as int8, and what one is worth in each channel of ``axis``; symmetric, within -127..127."""
    scales = channel_scales(weights, axis)
    shape = [1] * weights.ndim
    shape[axis] = -1
    rounded = weights / scales.reshape(shape)
    return np.rint(rounded, out=rounded).astype(np.int8), scales


def channel_scales(weights: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """What one of :func:`per_channel` is worth, by channel."""
    others = tuple(other for other in range(weights.ndim) if other != axis)
    scales = np.maximum(weights.max(others), -weights.min(others)) / np.float32(127)
    scales[scales == 0] = 1
    return np.asarray(scales, np.float32)


def summed_bias(bias: NDArray[np.float32], scales: NDArray[np.float32], input_scale: np.float32) -> NDArray[np.int32]:
    """A bias in the unit of a convolution's sums: what one of its weights is worth, times one of its input."""
    return np.rint(bias / (scales * input_scale)).astype(np.int32)


def relative_error(got: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """The root mean square of the difference, over that of what is exact."""
    return float(np.sqrt(np.square(got - exact).mean() / np.square(exact).mean()))
