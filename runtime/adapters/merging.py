"""A network's weights with changes made, each when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.adapters.changes import Array, Change, Difference
from calotype.runtime.adapters.rounding import round_to
from calotype.runtime.errors import InputError


class Merged(Mapping[str, Array]):
    """The tensors of a network that are changed, by name, in the dtypes of the network's own.

    Nothing is kept: each is made from the network's own when it is asked for, in the thread that asks.

    Args:
        changes: of each tensor, which they fit.
        own: the network's weights.
        files: that the changes are from, for messages.
    """

    def __init__(
        self, changes: Mapping[str, Sequence[Change]], own: Mapping[str, Array], files: Sequence[Path]
    ) -> None:
        self._changes, self._own, self._files = changes, own, files

    def __getitem__(self, name: str) -> Array:
        """A tensor with its changes made.

        Raises:
            InputError: it is beyond what its dtype holds.
        """
        return self.single(name).astype(self._own[name].dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def single(self, name: str) -> NDArray[np.float32]:
        """The values of ``[name]`` in float32, contiguous, which is quicker than to convert those.

        Raises:
            InputError: see ``[name]``.
        """
        old, (first, *rest) = self._own[name], self._changes[name]
        with np.errstate(all="ignore"):
            if isinstance(first, Difference):  # one array less to go through
                new = np.ascontiguousarray(first.difference()).reshape(old.shape)
                new += old
            else:
                new = old.astype(np.float32, order="C")
                first.add_to(new, old)
            for change in rest:
                change.add_to(new, old)
            fits = round_to(old.dtype, new)
        if not fits:
            files = ", ".join(map(str, self._files))
            what = f"the weight {name} is beyond what {old.dtype} holds"
            raise InputError(f"with {files} {what}; use a smaller scale")
        return new
