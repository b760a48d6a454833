"""Convolutions as they are or with fewer products, as ONNX Runtime on the CPU runs them: JSON.

How the latter work, and which of them engines use where, is in ``engine/winograd.py``.

Run it as ``python -m benchmarks.convolutions > benchmarks/results/convolutions-cpu-DATE.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from benchmarks.machine import machine, origin
from benchmarks.operators import node, opened
from calotype.engine import winograd
from calotype.engine.graph import Graph

# Rows, channels in and out, side; two rows are those of a guided picture in the UNet of SD 1.5, one is its decoder.
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


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    about = origin(f"python -m benchmarks.convolutions --rounds {rounds}", "benchmarks/convolutions.py")
    about["machine"] = {**machine(), "onnxruntime": onnxruntime.__version__}
    rows = {name: measure(*shape, rounds) for name, shape in SHAPES.items()}
    print(json.dumps({**about, "rounds": rounds, "rows": rows}, indent=2))


def measure(rows: int, channels: int, out: int, side: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each form in turn, and the largest difference from float64 over the largest value."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, channels, side, side), np.float32)
    weight = rng.standard_normal((out, channels, 3, 3), np.float32) / np.float32(3 * np.sqrt(channels))
    sessions = {"direct": direct(weight), **{f"{m} x {m}": minimal(weight, m) for m in winograd.POINTS}}
    exact = torch.nn.functional.conv2d(torch.tensor(x).double(), torch.tensor(weight).double(), padding=1).numpy()
    seconds: dict[str, list[float]] = {form: [] for form in sessions}
    found = {}
    for _ in range(rounds + 1):
        for form, session in sessions.items():
            start = time.perf_counter()
            (found[form],) = session.run(["y"], {"x": x})
            seconds[form].append(time.perf_counter() - start)
    return {
        form: {
            "ms": round(1e3 * statistics.median(own[1:]), 1),
            "times_faster": round(statistics.median(np.array(seconds["direct"][1:]) / np.array(own[1:])), 2),
            "off": float(f"{np.abs(found[form] - exact).max() / np.abs(exact).max():.1e}"),
        }
        for form, own in seconds.items()
    }


def direct(weight: NDArray[np.float32]) -> Any:
    """A session of one ``Conv``."""
    return opened([node("Conv", "x w", "y", pads=[1] * 4)], {"w": weight})


def minimal(weight: NDArray[np.float32], m: int) -> Any:
    """The same by tiles of ``m`` x ``m`` pixels, as engines have it."""
    convolution = node("Conv", "x w", "y", pads=[1] * 4)
    model = helper.make_model(helper.make_graph([convolution], "g", [], [], [numpy_helper.from_array(weight, "w")]))
    nodes = winograd.minimal(Graph(model.graph), convolution, "spread", m)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return opened(nodes, {**constants, "spread": winograd.spread(weight, m)})


if __name__ == "__main__":
    main()
