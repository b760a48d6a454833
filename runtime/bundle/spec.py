"""What goes into a graph and what comes out of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from calotype.runtime.bundle.schema import (
    GraphPath,
    Name,
    SchemaError,
    WeightsPath,
    at_least_one,
    having,
    matching,
    one_of,
    within,
)
from calotype.runtime.errors import BundleError, InputError, quoted

MOST_NUMBERS = 2**24  # of a tensor where every symbol is 1; prompts of the largest models have an eighth of it
DTYPES = ("float16", "float32", "int32", "int64")
PRECISIONS = ("float32", "float16")
_SYMBOL = r"([1-9][0-9]{0,5}\*)?[A-Za-z_][A-Za-z0-9_]{0,63}|[A-Za-z_][A-Za-z0-9_]{0,63}/[1-9][0-9]{0,5}"
_EXAMPLES = "4, 'height', '8*height', 'height/2'"
Dimension = Annotated[int, within(1, 2**31 - 1)] | Annotated[str, matching(_SYMBOL, _EXAMPLES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    A dimension is a number, a symbol (``"height"``), a symbol with a factor (``"8*height"``), or one that is divided
    and rounded up (``"height/2"``), as halving a picture does where its rows are odd.
    """

    name: Name
    dtype: Annotated[str, one_of(*DTYPES)]
    shape: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        if math.prod(factor for factor, _, _ in map(_parse, self.shape)) > MOST_NUMBERS:
            raise SchemaError(f"the tensor {quoted(self.name)} has more than {MOST_NUMBERS} numbers at the least")

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size.

        Raises:
            BundleError: it has a symbol that ``sizes`` has not.
        """
        try:
            return tuple(
                factor if symbol is None else -(-factor * sizes[symbol] // divisor)
                for factor, symbol, divisor in map(_parse, self.shape)
            )
        except KeyError as error:
            raise BundleError(
                f"the tensor {self.name!r} has the size {error}, and known are {', '.join(sizes)}; "
                "install the Calotype that wrote this bundle"
            ) from None

    def match_row(self, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        """Note the symbols' sizes by which one row has ``shape``; the first dimension, which counts rows, is left out.

        Raises:
            InputError: a row has another shape, or a symbol has two sizes.
        """
        for dimension, size in zip(self.shape[1:], shape, strict=False):
            factor, symbol, divisor = _parse(dimension)
            if symbol is None:
                fits = size == factor
            elif divisor > 1:  # what it was before it was rounded up, another tensor has to say
                fits = size == -(-sizes.get(symbol, 0) // divisor)
            else:
                fits = size % factor == 0 and sizes.setdefault(symbol, size // factor) == size // factor
            if not fits:
                break
        else:
            if len(self.shape) == len(shape) + 1:
                return
        raise InputError(f"a row of {self.name} has the shape {shape}; the network takes {self.shape[1:]} at {sizes}")

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """The sizes of its symbols where it has ``shape``; of one that was divided and rounded up, nothing is told."""
        pairs = [(_parse(dimension), size) for dimension, size in zip(self.shape, shape, strict=True)]
        return {
            symbol: size // factor for (factor, symbol, divisor), size in pairs if symbol is not None and divisor == 1
        }

    def count(self, sizes: Mapping[str, int]) -> int:
        """Number of elements at ``sizes``."""
        return math.prod(self.resolve(sizes))

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols its shape depends on."""
        return frozenset(symbol for _, symbol, _ in map(_parse, self.shape) if symbol is not None)

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One network of a bundle: its inputs and outputs, and the files that hold it.

    ``graphs`` maps a compute precision to an ONNX file; there is one in ``float32``, which the others are held against.
    All variants have the same inputs and outputs and point into the same ``weights``. Paths are relative to the bundle.
    """

    inputs: Annotated[tuple[TensorSpec, ...], at_least_one]
    outputs: Annotated[tuple[TensorSpec, ...], at_least_one]
    graphs: Annotated[Mapping[Annotated[str, one_of(*PRECISIONS)], GraphPath], having("float32")]
    weights: Annotated[tuple[WeightsPath, ...], at_least_one]

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, or None."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "graphs": dict(self.graphs),
            "weights": list(self.weights),
        }


def _parse(dimension: int | str) -> tuple[int, str | None, int]:
    """A dimension as (factor, symbol, divisor)."""
    if isinstance(dimension, int):
        return dimension, None, 1
    factor, star, rest = dimension.rpartition("*")
    symbol, slash, divisor = rest.partition("/")
    return int(factor) if star else 1, symbol, int(divisor) if slash else 1
