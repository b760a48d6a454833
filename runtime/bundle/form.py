"""What a network computes in, and what its weights are stored in while it runs."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import InputError, quoted

ALIASES = {"fp16": "float16", "fp32": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One value that names an engine, wherever one is named.

    Attributes:
        compute: ``float32``, ``float16`` or ``int8``, what products are computed in.
        storage: the same, what the opened engine's weights are.
    """

    compute: str
    storage: str

    @property
    def graph(self) -> str:
        """The precision of the bundle's graph that it is made from."""
        return "float32" if self.compute == "int8" else self.compute

    @classmethod
    def parse(cls, text: Any) -> Self:
        """The form of a name that people use; raises InputError for others."""
        name = ALIASES.get(text, text) if isinstance(text, str) else text
        if not isinstance(name, str) or name not in NAMES:
            raise InputError(f"the form {quoted(text)} is not known; valid: {', '.join((*NAMES, *ALIASES))}")
        return cls(compute=name, storage=name)

    def __str__(self) -> str:
        return self.compute


NAMES = ("float32", "float16", "int8")
FLOAT32, FLOAT16, INT8 = (Form.parse(name) for name in NAMES)


def default_form(spec: ModelSpec, backend: str) -> Form:
    """What ``backend`` is fast in: on a GPU the float16 graph, where there is one."""
    return FLOAT16 if backend != "cpu" and FLOAT16.graph in spec.graphs else FLOAT32
