"""DoRA: weights whose direction and whose length are changed apart.

Liu et al. 2024, "DoRA" (arXiv 2402.09353). PEFT and diffusers have it on a LoRA, LyCORIS on LoHa and LoKr too.
The two differ in what less than the whole of it is: PEFT shortens the direction's change and leaves the length as
trained; AUTOMATIC1111 and ComfyUI go that part of the way from the model's weight to the trained one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from calotype.runtime.adapters.changes import Array, Difference, Shape, shapes, single

EPSILON = np.finfo(np.float32).eps


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DoRA:
    """The weight with ``change`` added, made as long as ``magnitude`` says, and ``scale`` of the way there.

    ``magnitude`` is one value for each output; LyCORIS's older files have one for each input, (1, in, …).
    """

    change: Difference
    magnitude: Array
    scale: float

    @property
    def described(self) -> str:
        return f"{self.change.described} and {shapes(self.magnitude)}"

    def fits(self, shape: Shape) -> bool:
        axis = 1 if self._per_input(shape) else 0
        return self.change.fits(shape) and self.magnitude.size == shape[axis]

    def add_to(self, weight: Array, base: Array) -> None:
        new = single(base)
        new += self.change.difference().reshape(new.shape)
        axis = 1 if self._per_input(new.shape) else 0
        others = tuple(other for other in range(new.ndim) if other != axis)
        length = np.sqrt(np.sum(np.square(new), axis=others, keepdims=True)) + EPSILON
        new *= single(self.magnitude).reshape(length.shape) / length
        new -= base
        weight += np.float32(self.scale) * new

    def _per_input(self, shape: Shape) -> bool:
        own = self.magnitude.shape
        return len(shape) > 1 and len(own) > 1 and own[:2] == (1, shape[1]) and shape[:2] != (1, 1)
