"""A network's weights with changes made, each when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.adapters.changes import Array, ByRows, Change, Difference
from calotype.runtime.adapters.rounding import round_to
from calotype.runtime.errors import InputError

ROWS = 64  # of a matrix that are made at once: as wide as they are, they fit a processor's own cache


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

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not made for it."""
        return self._own[name].shape

    def single(self, name: str) -> NDArray[np.float32]:
        """The values of ``[name]`` in float32, contiguous, which is quicker than to convert those.

        Raises:
            InputError: see ``[name]``.
        """
        shape, adders = self._own[name].shape, self._by_rows(name)
        if not adders:
            return self._whole(name)
        made = np.empty(shape, np.float32)
        for _ in self._computed(name, adders, made.reshape(len(made), -1)):
            pass
        return made

    def pieces(self, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The same of a matrix, some rows at a time, in a processor's cache; each is void when the next is asked for.

        Raises:
            InputError: see ``[name]``.
        """
        adders = self._by_rows(name)
        if not adders:
            yield slice(None), self._whole(name)
        else:
            yield from self._computed(name, adders, None)

    def _by_rows(self, name: str) -> list[ByRows]:
        """What computes all changes of a tensor by rows; empty where some come at once."""
        if self._own[name].ndim < 2:
            return []
        with np.errstate(all="ignore"):  # what overflows is found in the sum
            found = [change.by_rows() if isinstance(change, Difference) else None for change in self._changes[name]]
        return [one for one in found if one is not None] if None not in found else []

    def _computed(
        self, name: str, adders: Sequence[ByRows], into: Array | None
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Pieces that were computed in ``into``, or one after the other in the same place."""
        own = self._own[name]
        old = own.reshape(len(own), -1)
        shape = (min(ROWS, len(old)), old.shape[1])
        scratch, other = (np.empty(shape, np.float32) for _ in range(2))
        for begin in range(0, len(old), ROWS):
            rows = slice(begin, min(begin + ROWS, len(old)))
            piece = scratch[: rows.stop - begin] if into is None else into[rows]
            with np.errstate(all="ignore"):
                adders[0](rows, piece)
                for add in adders[1:]:
                    add(rows, other[: len(piece)])
                    piece += other[: len(piece)]
                piece += old[rows]
                self._check(name, round_to(own.dtype, piece))
            yield rows, piece

    def _whole(self, name: str) -> NDArray[np.float32]:
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
            self._check(name, round_to(old.dtype, new))
        return new

    def _check(self, name: str, fits: bool) -> None:
        if not fits:
            files = ", ".join(map(str, self._files))
            what = f"the weight {name} is beyond what {self._own[name].dtype} holds"
            raise InputError(f"with {files} {what}; use a smaller scale")
