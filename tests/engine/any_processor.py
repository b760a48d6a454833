"""Engines in int8 on processors that the product builds none for."""

from __future__ import annotations

import pytest

from calotype.engine import cpu


def let_build_int8(patch: pytest.MonkeyPatch) -> None:
    """Build where bytes add up in 16 bits, too: there the pictures alone are wrong, and nothing but them."""
    if not cpu.multiplies_bytes():
        patch.setattr(cpu, "multiplies_bytes", lambda: True)
        patch.setattr(cpu, "MAX_ROOT_MEAN_SQUARE", float("inf"))
