"""Sessions that keep buffers for each of the sizes they were last run at."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.sessions.session import BaseSession, Session, Sizes

Key = tuple[tuple[str, int], ...]


@dataclasses.dataclass(kw_only=True)
class Shape:
    """One set of sizes, ready to run: its buffers by name, and which sessions it reads from, as they were then."""

    views: Mapping[str, NDArray[Any]]
    links: tuple[tuple[BaseSession, int], ...] = ()
    key: Key = ()


S = TypeVar("S", bound=Shape)


class ShapedSession(BaseSession, Generic[S]):
    """A session with buffers for each set of sizes; those not used for longest are given back.

    So sizes that alternate find what was written to them, and whatever holds the buffers' addresses stays true.

    Attributes:
        most_shapes: sets of sizes that are kept at once.
        kept_bytes: of buffers that are kept, beside those of the sizes in use.
    """

    most_shapes = 16
    kept_bytes = 64 << 20

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], name: str) -> None:
        super().__init__(inputs, outputs, name)
        self._tensors = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        self._symbols = frozenset[str]().union(*(spec.symbols for spec in self._tensors.values()))
        self._links: dict[str, tuple[BaseSession, str]] = {}
        self._shapes: OrderedDict[Key, S] = OrderedDict()
        # A step asks a dozen times: sizes are checked once, not each time.
        self._known: dict[Key, S] = {}
        self._asked: tuple[Sizes, S] | None = None

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`."""
        self._at(sizes)

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        views = self._at(sizes).views
        if name not in views:
            raise InputError(f"{self._name} has no {name!r}; valid: {', '.join(views)}")
        return views[name]

    def link(self, name: str, other: Session, output: str) -> None:
        """See :meth:`Session.link`."""
        self._check_usable()
        source = other.outlet() if isinstance(other, BaseSession) else None
        own = next((spec for spec in self.inputs if spec.name == name), None)
        its = next((spec for spec in other.outputs if spec.name == output), None)
        if source is None or own is None or its is None or (own.dtype, own.shape) != (its.dtype, its.shape):
            raise BackendError(
                f"{self._name}: the input {name} ({_described(own)}) cannot be linked to the output {output} "
                f"({_described(its)}); both must be there, alike in dtype and shape"
            )
        self._check_source(source)
        self._links[name] = source, output
        self._forget_all()

    def _at(self, sizes: Sizes) -> S:
        asked = self._asked  # a step asks for several buffers and a run, with one mapping that does not change
        if asked is not None and asked[0] is sizes:
            return asked[1]
        shape = self._known.get(tuple(sizes.items()))
        if shape is None or (shape.links and any(other.generation != then for other, then in shape.links)):
            return self._find(sizes)
        self._shapes.move_to_end(shape.key)
        if not shape.links:
            self._asked = sizes, shape
        return shape

    def _find(self, sizes: Sizes) -> S:
        self._check_usable()
        missing = sorted(name for name in self._symbols if sizes.get(name, 0) < 1)
        if missing:
            raise InputError(f"{self._name} needs 1 or more of {', '.join(missing)}; {dict(sizes)} was given")
        key = tuple((name, sizes[name]) for name in sorted(self._symbols))
        shape = self._shapes.get(key)
        if shape is not None and any(other.generation != then for other, then in shape.links):
            self._drop(key)
            shape = None
        if shape is None:
            shape = self._prepare(dict(key))
            shape.key = key
            shape.links = tuple((other, other.generation) for other, _ in self._links.values())
            self._shapes[key] = shape
            self._bound()
        self._known[tuple(sizes.items())] = shape
        return shape

    def _prepare(self, sizes: Sizes) -> S:
        """Buffers for ``sizes``, and all that runs at these need."""
        raise NotImplementedError

    def _forget(self, shape: S) -> None:
        """Give back what is not memory of Python's own."""

    def _check_source(self, source: BaseSession) -> None:
        """Raises BackendError where outputs of ``source`` cannot be read in place."""

    def _drop(self, key: Key) -> None:
        shape = self._shapes.pop(key)
        self._known = {asked: other for asked, other in self._known.items() if other is not shape}
        self._asked = None
        self._generation += 1
        self._forget(shape)

    def _forget_all(self) -> None:
        for key in list(self._shapes):
            self._drop(key)

    def _bound(self) -> None:
        """Give back the sizes that were not used for longest, where there are too many."""
        sizes = [sum(view.nbytes for view in shape.views.values()) for shape in self._shapes.values()]
        kept = sum(sizes[:-1])
        for key, size in zip(list(self._shapes)[:-1], sizes, strict=False):
            if len(self._shapes) <= self.most_shapes and kept <= self.kept_bytes:
                break
            self._drop(key)
            kept -= size

    def _close(self) -> None:
        self._forget_all()

    def _disown(self) -> None:
        super()._disown()
        self._asked = None
        self._known = {}  # so that the next call looks whether it may


def allocate(specs: Mapping[str, TensorSpec], sizes: Sizes, links: Mapping[str, tuple[BaseSession, str]]) -> Any:
    """Buffers in Python's memory by name, zero to begin with; those of ``links`` are the other session's."""
    return {
        name: links[name][0].buffer(links[name][1], sizes)
        if name in links
        else np.zeros(spec.resolve(sizes), spec.dtype)
        for name, spec in specs.items()
    }


def _described(spec: TensorSpec | None) -> str:
    return "there is none" if spec is None else f"{spec.dtype} {spec.shape}"
