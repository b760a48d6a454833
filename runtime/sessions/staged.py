"""What the sessions on a GPU share: pinned and GPU buffers for each set of sizes, and what has to be copied."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.sessions.cuda import Pointer
from calotype.runtime.sessions.device import Device, Staging, acquire, release
from calotype.runtime.sessions.session import BaseSession, Session, Sizes
from calotype.runtime.sessions.shapes import Shape, ShapedSession

# Of rows in a run: each number that occurs is a graph to keep, and up to a third more is computed than was asked for.
ROW_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def padded(rows: int) -> int:
    """The next number of rows that runs have."""
    return next((count for count in ROW_COUNTS if count >= rows), rows)


def most_rows(limit: int) -> int:
    """The most rows that a run has where ``limit`` would fit; 0 where none do."""
    return max((count for count in ROW_COUNTS if count <= limit), default=0)


@dataclasses.dataclass(kw_only=True)
class StagedShape(Shape):
    """Buffers on both sides.

    Attributes:
        staging: holds them.
        addresses: on the GPU, by name; of a linked input the other session's.
        copies_in: (GPU address, host address, bytes) of the inputs that are copied, by name.
        copies_out: (host address, GPU address, bytes) of the outputs.
        deferred: likewise of those that are copied when they are asked for, by name.
        fetched: those of them that were, since the last run.
        written: the inputs whose views were asked for since the last run.
    """

    staging: Staging
    addresses: dict[str, Pointer]
    copies_in: dict[str, tuple[Pointer, Pointer, int]]
    copies_out: list[tuple[Pointer, Pointer, int]]
    deferred: dict[str, tuple[Pointer, Pointer, int]]
    fetched: set[str]
    written: set[str]


S = TypeVar("S", bound=StagedShape)


class StagedSession(ShapedSession[S]):
    """A session on a GPU, which it gives back when it is closed; None is the first."""

    kept_bytes = 512 << 20

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        name: str,
        *,
        backend: str,
        device: int | None = None,
    ) -> None:
        super().__init__(inputs, outputs, name)
        self._linked_outputs = set[str]()
        self._defers = False
        self._device: Device = acquire(backend, device or 0)

    @property
    def keeps_bytes(self) -> bool:
        """See :attr:`Session.keeps_bytes`."""
        return False

    def padded(self, rows: int) -> int:
        """See :meth:`Session.padded`."""
        return padded(rows)

    def buffer(self, name: str, sizes: Sizes) -> NDArray[np.generic]:
        """See :meth:`Session.buffer`. An output that another session is linked to is not copied to the host."""
        shape = self._at(sizes)
        shape.written.add(name)
        if name in shape.deferred and name not in shape.fetched:
            self._fetch(shape, name)
        view = shape.views.get(name)
        return super().buffer(name, sizes) if view is None else view

    def link(self, name: str, other: Session, output: str) -> None:
        """See :meth:`Session.link`."""
        super().link(name, other, output)
        source, _ = self._links[name]
        assert isinstance(source, StagedSession)
        source._linked_outputs.add(output)
        source._forget_all()  # for it copies the output

    def take(self, name: str, sizes: Sizes, other: Session, output: str, other_sizes: Sizes) -> None:
        """See :meth:`Session.take`."""
        source = other.outlet() if isinstance(other, BaseSession) else None
        if not isinstance(source, StagedSession) or source._device is not self._device or name in self._links:
            super().take(name, sizes, other, output, other_sizes)
            return
        shape, its = self._at(sizes), source._at(other_sizes)
        view, made = shape.views[name], its.views[output]
        if view.shape != made.shape or view.dtype != made.dtype:
            raise InputError(f"{name} takes {view.dtype} of {view.shape}; {made.dtype} of {made.shape} was made")
        with self._device.lock:
            self._device.cuda.copy_on_device(
                shape.addresses[name], its.addresses[output], view.nbytes, self._device.stream
            )
        shape.written.discard(name)

    def defer_outputs(self) -> None:
        """See :meth:`Session.defer_outputs`."""
        self._check_usable()
        self._defers = True
        self._forget_all()

    def _fetch(self, shape: StagedShape, name: str) -> None:
        """Copy an output that was left on the GPU, and wait for it."""
        with self._device.lock:
            self._device.cuda.copy_to_host(*shape.deferred[name], self._device.stream)
            self._device.cuda.synchronize(self._device.stream)
        shape.fetched.add(name)

    def _stage(self, sizes: Sizes) -> StagedShape:
        """Buffers for ``sizes``."""
        own = [spec for name, spec in self._tensors.items() if name not in self._links]
        staging = Staging(self._device, own, {spec.name: spec.count(sizes) for spec in own})
        views = {spec.name: staging.view(spec.name, spec.resolve(sizes)) for spec in own}
        addresses = {spec.name: staging.device(spec.name) for spec in own}
        inputs = [spec.name for spec in self.inputs if spec.name in views]
        outputs = [spec.name for spec in self.outputs if spec.name not in self._linked_outputs]
        for name, (source, output) in self._links.items():
            assert isinstance(source, StagedSession)
            addresses[name] = source._at(sizes).addresses[output]
            views[name] = source._at(sizes).views[output]
        copies = {name: (staging.host(name), addresses[name], views[name].nbytes) for name in outputs}
        return StagedShape(
            views=views,
            staging=staging,
            addresses=addresses,
            copies_in={name: (addresses[name], staging.host(name), views[name].nbytes) for name in inputs},
            copies_out=[] if self._defers else list(copies.values()),
            deferred=copies if self._defers else {},
            fetched=set(),
            written=set(inputs),
        )

    def _copy_in(self, shape: StagedShape) -> None:
        """Queue the copies of what was written."""
        for name in shape.written:
            if name in shape.copies_in:
                target, source, size = shape.copies_in[name]
                self._device.cuda.copy_to_device(target, source, size, self._device.stream)
        shape.written.clear()
        shape.fetched.clear()

    def _copy_out(self, shape: StagedShape) -> None:
        """Queue the copies of the outputs."""
        for target, source, size in shape.copies_out:
            self._device.cuda.copy_to_host(target, source, size, self._device.stream)

    def _forget(self, shape: S) -> None:
        shape.staging.close()

    def _check_source(self, source: BaseSession) -> None:
        if not isinstance(source, StagedSession):
            raise BackendError(f"{self._name} runs on the GPU and {source._name} does not; copy its output instead")

    def _close(self) -> None:
        with self._device.lock:
            super()._close()
        release(self._device)
