"""The arrays that travel through the runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# One row of each of a denoising network's inputs, by name, such as "encoder_hidden_states" (tokens, D).
Inputs = Mapping[str, Array]
