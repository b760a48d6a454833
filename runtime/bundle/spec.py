"""What goes into a graph and what comes out of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from calotype.runtime.errors import BundleError, InputError

Dimension = int | str
DTYPES = ("float16", "float32", "int32", "int64")
PRECISIONS = ("float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    A dimension is a number, a symbol (``"height"``), or a symbol with a factor (``"8*height"``).
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"tensor {self.name!r} has dtype {self.dtype!r}; valid: {', '.join(DTYPES)}")
        for dimension in self.shape:
            _parse(self.name, dimension)

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size; a missing symbol raises ``KeyError``."""
        shape = []
        for dimension in self.shape:
            factor, symbol = _parse(self.name, dimension)
            shape.append(factor if symbol is None else factor * sizes[symbol])
        return tuple(shape)

    def match_row(self, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        """Note the symbols' sizes by which one row has ``shape``; the first dimension, which counts rows, is left out.

        Raises:
            InputError: a row has another shape, or a symbol has two sizes.
        """
        for dimension, size in zip(self.shape[1:], shape, strict=False):
            factor, symbol = _parse(self.name, dimension)
            fits = size == factor if symbol is None else size % factor == 0
            if not fits or (symbol is not None and sizes.setdefault(symbol, size // factor) != size // factor):
                break
        else:
            if len(self.shape) == len(shape) + 1:
                return
        raise InputError(f"a row of {self.name} has the shape {shape}; the network takes {self.shape[1:]} at {sizes}")

    def count(self, sizes: Mapping[str, int]) -> int:
        """Number of elements at ``sizes``."""
        return math.prod(self.resolve(sizes))

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols its shape depends on."""
        return frozenset(
            symbol for _, symbol in (_parse(self.name, dimension) for dimension in self.shape) if symbol is not None
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read ``{"name": …, "dtype": …, "shape": […]}``."""
        return cls(name=value["name"], dtype=value["dtype"], shape=tuple(value["shape"]))

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One network of a bundle: its inputs and outputs, and the files that hold it.

    ``graphs`` maps a compute precision (``float32``, ``float16``) to an ONNX file; all variants have the same inputs
    and outputs and point into the same ``weights``. Paths are relative to the bundle.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graphs: Mapping[str, str]
    weights: tuple[str, ...]

    def __post_init__(self) -> None:
        for precision in self.graphs:
            if precision not in PRECISIONS:
                raise BundleError(f"graph precision {precision!r} is not known; valid: {', '.join(PRECISIONS)}")

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, or None."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the manifest's record of a network."""
        return cls(
            inputs=tuple(TensorSpec.from_json(item) for item in value["inputs"]),
            outputs=tuple(TensorSpec.from_json(item) for item in value["outputs"]),
            graphs=dict(value["graphs"]),
            weights=tuple(value["weights"]),
        )

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "graphs": dict(self.graphs),
            "weights": list(self.weights),
        }


def _parse(name: str, dimension: Dimension) -> tuple[int, str | None]:
    """A dimension as (factor, symbol)."""
    if isinstance(dimension, int) and not isinstance(dimension, bool) and dimension > 0:
        return dimension, None
    if isinstance(dimension, str):
        factor, star, symbol = dimension.rpartition("*")
        if symbol.isidentifier() and (not star or factor.isdecimal()):
            return int(factor) if star else 1, symbol
    raise BundleError(f"tensor {name!r} has the dimension {dimension!r}; valid: 4, 'height', '8*height'")
