"""Convolutions as they are or with fewer products, as ONNX Runtime runs them on the CPU.

How the latter work, and which of them engines use where, is in ``engine/winograd.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from benchmarks.micro.harness import Figures, Options, Row, Seconds
from benchmarks.micro.operators import node, opened
from calotype.engine import winograd
from calotype.engine.graph import Graph

# By title: rows, channels in and out, side. Two rows are those of a guided picture in the UNet of SD 1.5, one is that
# of its decoder.
SHAPES = {
    "UNet at 256, first level": (2, 320, 320, 32),
    "UNet at 256, first level, joined": (2, 960, 320, 32),
    "UNet at 256, second level": (2, 640, 640, 16),
    "UNet at 256, second level, joined": (2, 1280, 640, 16),
    "UNet at 256, third level": (2, 1280, 1280, 8),
    "UNet at 256, deepest level": (2, 1280, 1280, 4),
    "UNet at 512, first level": (2, 320, 320, 64),
    "UNet at 512, second level": (2, 640, 640, 32),
    "UNet at 512, third level": (2, 1280, 1280, 16),
    "VAE at 256, smallest": (1, 512, 512, 32),
    "VAE at 256, third": (1, 512, 512, 128),
    "VAE at 256, second": (1, 256, 256, 256),
    "VAE at 256, full size": (1, 128, 128, 256),
}


def rows(options: Options) -> Iterator[Row]:
    """Every form of each shape."""
    for title, shape in options.some(SHAPES.items()):
        yield row(title, *shape)


def row(title: str, count: int, channels: int, out: int, side: int) -> Row:
    """All forms of one shape; ``off`` is the largest difference from float64 over the largest value."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, channels, side, side), np.float32)
    weight = rng.standard_normal((out, channels, 3, 3), np.float32) / np.float32(3 * np.sqrt(channels))
    sessions = {"direct": direct(weight), **{f"{m} x {m}": minimal(weight, m) for m in winograd.POINTS}}
    exact = torch.nn.functional.conv2d(torch.tensor(x).double(), torch.tensor(weight).double(), padding=1).numpy()

    def off(made: Mapping[str, Any], _: Seconds) -> dict[str, Figures]:
        return {
            form: {"off": float(f"{np.abs(y - exact).max() / np.abs(exact).max():.1e}")} for form, (y,) in made.items()
        }

    forms = {form: functools.partial(session.run, ["y"], {"x": x}) for form, session in sessions.items()}
    return Row(title=title, forms=forms, more=off, facts={"shape": [count, channels, out, side]})


def direct(weight: NDArray[np.float32]) -> Any:
    """A session that computes it as one ``Conv``."""
    return opened([node("Conv", "x w", "y", pads=[1] * 4)], {"w": weight})


def minimal(weight: NDArray[np.float32], m: int) -> Any:
    """A session that computes the same by tiles of ``m`` x ``m`` pixels, as engines have it."""
    convolution = node("Conv", "x w", "y", pads=[1] * 4)
    model = helper.make_model(helper.make_graph([convolution], "g", [], [], [numpy_helper.from_array(weight, "w")]))
    nodes = winograd.minimal(Graph(model.graph), convolution, "spread", m)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return opened(nodes, {**constants, "spread": winograd.spread(weight, m)})
