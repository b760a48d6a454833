"""Deep-feature caching: most evaluations compute a UNet's outermost layer alone, on a feature that is kept.

Ma et al. 2023, "DeepCache" (arXiv 2312.00858).
"""

from __future__ import annotations

import numpy as np

from calotype.runtime.arrays import Array

# The network that makes the deep feature, and the one that is given it.
DEEP, SHALLOW = "unet_deep", "unet_shallow"


class FeatureCache:
    """The deep feature of one job's last whole evaluation, allocated once.

    Args:
        interval: the whole UNet is evaluated every so many times.
        shape: (rows, C, h, w), the feature's at the most rows that the job ever has.
    """

    def __init__(self, interval: int, shape: tuple[int, ...]) -> None:
        self.interval = interval
        self._feature: Array = np.zeros(shape, np.float32)
        self._rows = self._age = 0

    def network(self, rows: int) -> str:
        """The network of the next evaluation, of so many rows; where guidance sets in, the feature lacks a row."""
        return SHALLOW if rows <= self._rows and self._age < self.interval else DEEP

    def keep(self, feature: Array) -> None:
        """Take over what a whole evaluation made, (rows, C, h, w)."""
        self._rows, self._age = len(feature), 0
        self._feature[: self._rows] = feature

    def give(self, out: Array) -> None:
        """Hand the feature to an evaluation, (rows, C, h, w); its conditional row comes first, and stays when guidance
        ends.
        """
        out[:] = self._feature[: len(out)]

    def grow_old(self) -> None:
        """Count an evaluation, the one that made the feature or one that used it."""
        self._age += 1
