"""What every backend offers: one network, opened, over buffers that are allocated before it runs."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.closing import Closing
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.parallel import run_parallel

Sizes = Mapping[str, int]
Changes = Mapping[str, NDArray[Any]]  # weights by name; each may be made when it is read


@runtime_checkable
class SingleChanges(Protocol):
    """Changes that are computed in float32, and have them in that too."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of ``[name]``."""

    def single(self, name: str) -> NDArray[np.float32]:
        """The values of ``[name]`` in float32."""

    def pieces(self, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The same of a matrix, some rows at a time; each is void when the next is asked for."""


class Session(Protocol):
    """One network, ready to run."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def generation(self) -> int:
        """A number that rises whenever buffers moved or were emptied.

        Views that were handed out before are void then, and what was written is lost. Until it rises, what was
        written at one set of sizes stands there; another set of sizes has buffers of its own.
        """

    @property
    def keeps_bytes(self) -> bool:
        """Whether a row's outputs are the same to the bit whatever else is in the run.

        They are in float32 on a CPU. On a GPU last bits follow the number of rows, as a matrix product's blocking
        does. In int8 the values of a run share one scale, so only rows of one picture may be together in it.
        """

    @property
    def engine(self) -> Path | None:
        """The plan that is opened; None where it is the bundle's graph."""

    @property
    def own_bytes(self) -> int:
        """About how many bytes its weights take that it shares with no other session; 0 where that is next to none."""

    @property
    def refits(self) -> bool:
        """Whether :meth:`set_weights` costs less than to open the network anew, and less memory."""

    def operators(self) -> dict[str, float]:
        """Seconds that each kind of operator took in all runs; empty where that is not known."""

    def capacity(self, sizes: Sizes) -> int:
        """The most rows of one run at ``sizes``, whose own number of rows does not count; 0 where none fits.

        ``sizes`` name every symbol but that of the rows, which is ``rows`` for a denoising network, else ``batch``.
        """

    def padded(self, rows: int) -> int:
        """The number of rows that a run of ``rows`` takes: the next of a few on a GPU, where each has a graph."""

    def reserve(self, sizes: Sizes) -> None:
        """Make ready for runs at ``sizes``: every buffer, and on a GPU the first run, which is slow."""

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """A view of the buffer of the input or output ``name``, in the shape it has at ``sizes``.

        Asking for an input's view counts as writing to it: a run copies to the GPU what was asked for since the last.
        """

    def write(self, name: str, sizes: Sizes, value: NDArray[Any], row: int | None = None) -> None:
        """Put ``value`` into an input, or into one row of it; nothing is converted or repeated to fit.

        Raises:
            InputError: it has another shape or dtype, or there is no such row.
        """

    def run(self, sizes: Sizes) -> None:
        """Compute the outputs from what stands in the input buffers."""

    def link(self, name: str, other: Session, output: str) -> None:
        """Read the input ``name`` from where the session ``other`` leaves its ``output``, on the device itself.

        Raises:
            BackendError: the backend cannot, or the two do not fit.
        """

    def take(self, name: str, sizes: Sizes, other: Session, output: str, other_sizes: Sizes) -> None:
        """Put an ``output`` that ``other`` has just made into the input ``name``, where both can on the device itself.

        Raises:
            InputError: they differ in shape.
        """

    def defer_outputs(self) -> None:
        """Leave outputs on the device until their buffers are asked for; for what others :meth:`take`."""

    def set_weights(self, changes: Changes | None) -> None:
        """Replace weights by name, from the bundle's own; None is those alone. When that fails, all is as before.

        Raises:
            BackendError: the backend cannot change weights in place, or not to these.
        """

    def trim(self) -> None:
        """Give back what runs at large sizes have taken and the next such run takes anew."""

    def close(self) -> None:
        """Give everything back; more calls do nothing. What needs the network is a BackendError then."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BaseSession(Closing):
    """What is the same in every session; see :class:`Session`.

    A session knows when its process was forked: the library's threads are not in the child, so there it refuses to
    work, and is never destroyed, which would wait for them.

    Args:
        inputs: of the network.
        outputs: likewise.
        name: of the network, for messages.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], name: str) -> None:
        self.inputs, self.outputs, self._name = tuple(inputs), tuple(outputs), name
        self._generation = 0
        self._refusal: str | None = None
        _opened.add(self)

    @property
    def generation(self) -> int:
        """See :attr:`Session.generation`."""
        return self._generation

    @property
    def keeps_bytes(self) -> bool:
        """See :attr:`Session.keeps_bytes`."""
        return True

    @property
    def engine(self) -> Path | None:
        """See :attr:`Session.engine`."""
        return None

    @property
    def own_bytes(self) -> int:
        """See :attr:`Session.own_bytes`."""
        return 0

    @property
    def refits(self) -> bool:
        """See :attr:`Session.refits`."""
        return False

    def operators(self) -> dict[str, float]:
        """See :meth:`Session.operators`."""
        return {}

    def padded(self, rows: int) -> int:
        """See :meth:`Session.padded`."""
        return rows

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        raise NotImplementedError

    def write(self, name: str, sizes: Sizes, value: NDArray[Any], row: int | None = None) -> None:
        """See :meth:`Session.write`."""
        buffer = self.buffer(name, sizes)
        if row is not None and not 0 <= row < len(buffer):
            raise InputError(f"{name} has no row {row}; valid: 0 to {len(buffer) - 1}")
        place = buffer if row is None else buffer[row, ...]
        if value.shape != place.shape or value.dtype != place.dtype:
            raise InputError(
                f"{name} takes {place.dtype} of the shape {place.shape}; {value.dtype} of {value.shape} was given"
            )
        place[...] = value

    def link(self, name: str, other: Session, output: str) -> None:
        """See :meth:`Session.link`."""
        raise BackendError(f"{self._name}: {name} cannot be linked here; copy {output} into its buffer")

    def take(self, name: str, sizes: Sizes, other: Session, output: str, other_sizes: Sizes) -> None:
        """See :meth:`Session.take`."""
        self.write(name, sizes, other.buffer(output, other_sizes))

    def defer_outputs(self) -> None:
        """See :meth:`Session.defer_outputs`."""

    def set_weights(self, changes: Changes | None) -> None:
        """See :meth:`Session.set_weights`."""
        raise BackendError(f"{self._name}: its weights cannot be changed in place; open it again with them")

    def trim(self) -> None:
        """See :meth:`Session.trim`."""

    def close(self) -> None:
        """See :meth:`Session.close`."""
        if self._refusal is None:
            self._refusal = f"{self._name} is closed; open it again"
            self._close()

    def outlet(self) -> BaseSession:
        """The session behind this one whose outputs others can be linked to; raises BackendError without."""
        return self

    def _close(self) -> None:
        """Give everything back, once."""

    def _check_usable(self) -> None:
        if self._refusal is not None:
            raise BackendError(self._refusal)

    def _disown(self) -> None:
        """In a forked child: refuse to work, and stay in memory for good."""
        if self._refusal is None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            self._refusal = (
                f"{self._name} was opened before this process was forked, and cannot run in it; open it after the "
                'fork, or start processes with multiprocessing.get_context("spawn")'
            )


def single(changes: Changes, name: str) -> NDArray[np.float32]:
    """One of ``changes`` in float32."""
    if isinstance(changes, SingleChanges):
        return changes.single(name)
    return changes[name].astype(np.float32, copy=False)


def read_all(changes: Changes, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """Those of ``changes``, or those of them that are named, contiguous, made in several threads."""
    wanted = sorted(changes if names is None else changes.keys() & names)
    return dict(zip(wanted, run_parallel(lambda name: np.ascontiguousarray(changes[name]), wanted), strict=True))


def run_once(session: Session, inputs: Changes) -> dict[str, NDArray[Any]]:
    """The outputs of ``session`` for these inputs, by name."""
    sizes: dict[str, int] = {}
    for item in session.inputs:
        sizes |= item.sizes(inputs[item.name].shape)
    session.reserve(sizes)
    for item in session.inputs:
        session.write(item.name, sizes, inputs[item.name])
    session.run(sizes)
    return {item.name: session.buffer(item.name, sizes).copy() for item in session.outputs}


_opened: weakref.WeakSet[BaseSession] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_opened):
        session._disown()


os.register_at_fork(after_in_child=_after_fork)
