"""How an engine's weights are laid out, made from a bundle's: what the engine notes for each of them.

An engine's graph has its weights as its kernels read them. So that others can take the place of some of them when it
is opened, the graph carries, as a remark, which tensor of the bundle each is made from, and by which steps:

- ``["transpose", [1, 0]]``: axes in another order;
- ``["reshape", [320, 1, 1]]``: another shape of the same values;
- ``["spread", 4]``: a kernel of 3 x 3 pixels for tiles of 4 x 4; see :mod:`calotype.runtime.graphs.winograd`;
- ``["blocks", 16]``: ONNX Runtime's layout of a convolution's kernel, inputs and outputs in blocks of 16;
- ``["output_blocks", 16]``: outputs alone;
- ``["pad", 16]``: zeros behind, up to that length;
- ``["int8", 0]``: rounded to eight-bit integers, for each channel of that axis; see
  :mod:`calotype.runtime.graphs.quantization`;
- ``["scales", 0]``: what one of those is worth;
- ``["sum", ["conv.bias", 0.1]]``: the bias, another tensor, of a convolution of those, in the unit of its sums.

All but the rounded are in float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.graphs.quantization import channel_scales, per_channel, summed_bias
from calotype.runtime.graphs.remarks import LAYOUTS, read_remark
from calotype.runtime.graphs.winograd import spread
from calotype.runtime.untrusted import parse_json

Array = NDArray[Any]
Step = tuple[str, Any]
Read = Callable[[str], NDArray[np.float32]]
TURNED: tuple[Step, ...] = (("transpose", [1, 0]),)
ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What one of an engine's weights is made from: a tensor of the bundle, and the steps from it."""

    tensor: str
    steps: tuple[Step, ...] = ()

    @property
    def tensors(self) -> frozenset[str]:
        """All tensors that it is made from."""
        return frozenset((self.tensor, *(argument[0] for name, argument in self.steps if name == "sum")))

    def apply(self, value: Array, read: Read) -> Array:
        """The engine's weight for other values, contiguous.

        Args:
            value: of :attr:`tensor`.
            read: tells those of another tensor, in float32.

        Raises:
            ValueError: the tensor has another shape than it had when the engine was built.
        """
        made = value.astype(np.float32, copy=False)
        for name, argument in self.steps:
            made = _summed(made, argument, read) if name == "sum" else STEPS[name](made, argument)
        return np.ascontiguousarray(made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layouts:
    """Of all of an engine's weights.

    Attributes:
        of: by the weight's name in the engine.
        fixed: tensors of the bundle that it was made from and that cannot be replaced.
    """

    of: Mapping[str, Layout]
    fixed: frozenset[str] = frozenset()

    def to_text(self) -> str:
        """As a graph carries it."""
        of = {name: [own.tensor, *map(list, own.steps)] for name, own in self.of.items()}
        return json.dumps({"of": of, "fixed": sorted(self.fixed)})

    @classmethod
    def read(cls, model: bytes) -> Self | None:
        """What the ONNX file ``model`` carries; None where it carries nothing, as those of before.

        Raises:
            ValueError: it is damaged.
        """
        text = read_remark(model, LAYOUTS)
        if text is None:
            return None
        value = parse_json(text)
        try:
            of = {
                name: Layout(tensor=str(tensor), steps=tuple((str(step), argument) for step, argument in steps))
                for name, (tensor, *steps) in value["of"].items()
            }
            found = cls(of=of, fixed=frozenset(map(str, value["fixed"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its layouts are damaged: {error}") from None
        if not {step for own in of.values() for step, _ in own.steps} <= {*STEPS, "sum"}:
            raise ValueError("its layouts have steps that are not known here")
        return found

    def affected(self, tensors: Sequence[str]) -> dict[str, Layout]:
        """The weights that are made from any of ``tensors``."""
        wanted = set(tensors)
        return {name: own for name, own in self.of.items() if own.tensors & wanted}


def _transposed(value: Array, axes: list[int]) -> Array:
    return _turned(value) if value.ndim == 2 and axes == [1, 0] else value.transpose(axes)


def _turned(matrix: Array) -> Array:
    """The transpose, some rows at a time: six times as fast as in one go, which misses the cache."""
    return turned(matrix.shape, [(slice(None), matrix)])


def turned(shape: Sequence[int], pieces: Iterable[tuple[slice, Array]]) -> Array:
    """The transpose of a float32 matrix of that shape, which comes some rows at a time."""
    made = np.empty(shape[::-1], np.float32)
    for rows, piece in pieces:
        part = made[:, rows]
        for row in range(0, len(piece), ROWS):
            part[:, row : row + ROWS] = piece[row : row + ROWS].T
    return made


def _blocks(kernel: Array, size: int) -> Array:
    """(O, I, H, W) as (O / size, I / size, H, W, size of inputs, size of outputs), under the shape it had."""
    kernel = _padded(kernel, size)
    outputs, inputs, *pixels = kernel.shape
    split = kernel.reshape(outputs // size, size, inputs // size, size, *pixels)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1)).reshape(kernel.shape)


def _output_blocks(kernel: Array, size: int) -> Array:
    """(O, I, H, W) as (O / size, I, H, W, size of outputs), under the shape it had."""
    kernel = _padded(kernel, size)
    split = kernel.reshape(-1, size, *kernel.shape[1:])
    return np.ascontiguousarray(split.transpose(0, 2, 3, 4, 1)).reshape(kernel.shape)


def _padded(kernel: Array, size: int) -> Array:
    """With zeros for the outputs that are missing in the last block."""
    return _pad(kernel, math.ceil(len(kernel) / size) * size)


def _pad(value: Array, length: int) -> Array:
    if len(value) > length:
        raise ValueError(f"{len(value)} values are more than {length}")
    return np.pad(value, [(0, length - len(value)), *[(0, 0)] * (value.ndim - 1)]) if len(value) < length else value


def _summed(kernel: Array, argument: Any, read: Read) -> Array:
    bias, input_scale = argument
    return summed_bias(read(bias), channel_scales(kernel, 0), np.float32(input_scale))


STEPS: Mapping[str, Callable[[Array, Any], Array]] = {
    "transpose": _transposed,
    "reshape": lambda value, shape: value.reshape(shape),
    "spread": spread,
    "blocks": _blocks,
    "output_blocks": _output_blocks,
    "pad": _pad,
    "int8": lambda value, axis: per_channel(value, axis)[0],
    "scales": channel_scales,
}
