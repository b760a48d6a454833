"""Canny's edges, by the library whose edges ControlNets were trained with."""

from __future__ import annotations

import numpy as np
from PIL import Image

from calotype.runtime.errors import MissingPackageError


def canny(image: Image.Image, low: int, high: int) -> Image.Image:
    """The edges of ``image``, white on black: gradients above ``high``, and those above ``low`` that join them.

    Canny 1986, "A Computational Approach to Edge Detection".

    Raises:
        MissingPackageError: OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingPackageError("opencv-python-headless", "control") from error
    return Image.fromarray(cv2.Canny(np.ascontiguousarray(np.asarray(image.convert("RGB"))), low, high)).convert("RGB")
