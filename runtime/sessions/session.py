"""What every backend offers: one network, opened, over buffers that are allocated before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from calotype.runtime.bundle.spec import TensorSpec

Sizes = Mapping[str, int]


class Session(Protocol):
    """One network, ready to run."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def takes(self, sizes: Sizes) -> bool:
        """Whether one run of ``sizes`` may hold several pictures.

        On a GPU their last bits then depend on what else is in it, as a matrix product's blocking does.
        """

    def reserve(self, sizes: Sizes) -> None:
        """Allocate every buffer for ``sizes``, the largest to come. Views handed out before are void."""

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """A view of the buffer of the input or output ``name``, in the shape it has at ``sizes``."""

    def run(self, sizes: Sizes) -> None:
        """Compute the outputs from what stands in the input buffers."""

    def close(self) -> None:
        """Give everything back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
