"""A stand-in for CUDA in the place of its package."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from calotype.runtime.sessions import device
from tests.runtime.cuda_standin import Cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A GPU on which nothing is left lying about at the end of a test."""
    standin = Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", standin)  # type: ignore[arg-type]
    monkeypatch.setattr("calotype.runtime.sessions.cuda._used", set())
    yield standin
    gc.collect()
    assert (standin.device, standin.host, standin.streams, standin.graphs) == ({}, {}, set(), {})
    assert device._shared == {}
