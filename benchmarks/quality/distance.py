"""How far the pictures of a mode are from the exact ones, and how much less often they are retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quality.features import features


def compare(exact: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """PSNR in dB, its median and what nine of ten reach, and the mean distance of features; None dB is equal."""
    pixels = [np.stack([np.asarray(picture, np.float64) for picture in side]) for side in (exact, pictures)]
    errors = np.square(pixels[0] - pixels[1]).mean(axis=(1, 2, 3))
    if not errors.any():
        return {"psnr_db": None, "psnr_tenth_db": None, "distance": 0.0}
    psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-6))
    distance = np.linalg.norm(features(list(exact)) - features(list(pictures)), axis=1)
    return {
        "psnr_db": round(float(np.median(psnr)), 1),
        "psnr_tenth_db": round(float(np.quantile(psnr, 0.1)), 1),
        "distance": round(float(distance.mean()), 4),
    }


def change(
    exact: NDArray[np.bool_], own: NDArray[np.bool_], pairs: Sequence[dict[str, str]]
) -> dict[str, dict[str, float | None]]:
    """By how many points ``own`` is retrieved more often than ``exact``, and the standard error, by split.

    Both are (seeds * pairs,), all pairs of a seed before the next one's. Seeds of a pair are not independent, so the
    pairs are the sample, each the mean of its seeds; a single pair has no error.
    """
    points = 100 * (own.astype(float) - exact).reshape(-1, len(pairs)).mean(axis=0)
    found: dict[str, dict[str, float | None]] = {}
    for split in ("seen", "held_out"):
        part = points[[pair["split"] == split for pair in pairs]]
        error = None if len(part) < 2 else round(float(part.std(ddof=1) / np.sqrt(len(part))), 2)
        found[split] = {"mean": round(float(part.mean()), 2) if len(part) else None, "error": error}
    return found
