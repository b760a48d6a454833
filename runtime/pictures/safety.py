"""The safety checker of Stable Diffusion's checkpoints: whether a picture is like what it was told to look for.

A picture's CLIP embedding is compared with those of a few concepts, each with a threshold of its own; where it is like
one of those that need special care, all thresholds are a little lower. The decisions are those of diffusers'
``StableDiffusionSafetyChecker``, whose weights come from the checkpoint. It sees coarse things alone, and is often
wrong, in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import SAFETY_CHECKER
from calotype.runtime.errors import BundleError
from calotype.runtime.pictures.clip_pictures import clip_pixels
from calotype.runtime.sessions import Session

CAREFUL = 0.01  # how much lower thresholds are where special care is needed
DIGITS = 3  # that scores are rounded to


class SafetyChecker:
    """Looks at pictures with a network of the bundle.

    Args:
        session: takes ``pixel_values`` (batch, 3, S, S), and gives how far the cosines to the embeddings of concepts
            that need ``special_care`` (batch, 3) and of ``concepts`` (batch, 17) are above their thresholds.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        (pixels,) = session.inputs
        self._size = int(pixels.shape[-1])

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether it takes exception to each of ``images``, in RGB."""
        return [self._flagged(image) for image in images]

    def trim(self) -> None:
        """See :meth:`Session.trim`."""
        self._session.trim()

    def close(self) -> None:
        """Give everything back."""
        self._session.close()

    def _flagged(self, image: Image.Image) -> bool:
        sizes = {"batch": 1}
        self._session.buffer("pixel_values", sizes)[:] = clip_pixels(image, self._size)[None]
        self._session.run(sizes)
        special, concepts = (
            np.asarray(self._session.buffer(name, sizes)[0], np.float64) for name in ("special_care", "concepts")
        )
        careful = CAREFUL if (special.round(DIGITS) > 0).any() else 0.0
        return bool(((concepts + careful).round(DIGITS) > 0).any())


def check_has_checker(bundle: Bundle) -> None:
    """Raises BundleError where a bundle was exported without one."""
    if SAFETY_CHECKER not in bundle.manifest.networks:
        raise BundleError(
            f"{bundle.path} has no {SAFETY_CHECKER}; export the checkpoint again with --safety-checker, if it has one"
        )
