"""The option ``--precision``: one vocabulary, and the short names that people type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

SHORT = {"fp16": "float16", "fp32": "float32", "half": "float16", "full": "float32"}


class Precision(click.Choice[str]):
    """One of some precisions by its name, or by a short name of it.

    Args:
        names: such as ``float16``; in the help in this order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :meth:`click.ParamType.convert`."""
        return super().convert(SHORT.get(value, value), param, ctx)
