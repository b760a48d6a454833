"""Convolutions as they are or with fewer products, as ONNX Runtime on the CPU runs them: JSON.

A 3 x 3 convolution that makes m x m pixels at a time needs (m + 2)^2 products a pair of channels instead of 9 m^2
(Winograd's minimal filtering; Lavin and Gray 2015, arXiv 1509.09308). The pixels of each tile are transformed by a
strided convolution of one channel, the products are matrix products of all tiles, and another one turns them back.

Run it as ``python -m benchmarks.convolutions > benchmarks/results/convolutions-cpu-DATE.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from fractions import Fraction
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.machine import machine, origin
from benchmarks.operators import node, opened
from calotype.engine.cpu_operators import CONTRIB

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
POINTS = {2: (0, 1, -1), 4: (0, 1, -1, Fraction(1, 2), -2)}  # where polynomials are evaluated, and infinity


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
    sessions = {"direct": direct(weight), **{f"{m} x {m}": minimal(weight, rows, side, m) for m in POINTS}}
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


def minimal(weight: NDArray[np.float32], rows: int, side: int, m: int) -> Any:
    """The same of (rows, C, side, side), whose ``side`` is a multiple of ``m``."""
    back, kernel, tile = transforms(m)
    (out, channels), size, tiles = weight.shape[:2], (m + 2) ** 2, (side // m) ** 2
    constants = {
        # (1, size, out, channels)
        "w": np.einsum("ij,kcjl,ml->imkc", kernel, weight, kernel).reshape(1, size, out, channels).astype(np.float32),
        "tile": np.einsum("ij,kl->ikjl", tile, tile).reshape(size, 1, m + 2, m + 2).astype(np.float32),
        "back": np.einsum("ij,kl->ikjl", back, back).reshape(m * m, size).astype(np.float32),
        "planes": np.array([channels * rows, 1, side, side]),
        "apart": np.array([channels, rows, size, tiles]),
        "flat": np.array([rows, size, out * tiles]),
        "pixels": np.array([rows, m * m * out, side // m, side // m]),
    }
    nodes = [
        node("Transpose", "x", "turned", perm=[1, 0, 2, 3]),
        node("Reshape", "turned planes", "plane"),
        node("Conv", "plane tile", "seen", strides=[m, m], pads=[1] * 4),
        node("Reshape", "seen apart", "factors"),
        node("FusedMatMul", "w factors", "products", domain=CONTRIB, transBatchB=1),  # channels first: never copied
        node("Reshape", "products flat", "sums"),
        node("MatMul", "back sums", "own"),
        node("Reshape", "own pixels", "blocks"),
        node("DepthToSpace", "blocks", "y", blocksize=m, mode="DCR"),
    ]
    return opened(nodes, constants)


def transforms(m: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of sums back to pixels (m, m + 2), of a kernel (m + 2, 3), of a tile's pixels (m + 2, m + 2); Toom and Cook."""
    points = [Fraction(point) for point in POINTS[m]]
    others = [[other for other in points if other != point] for point in points]
    scale = [np.prod([point - other for other in rest]) for point, rest in zip(points, others, strict=True)]
    back = [[point**power for point in points] + [Fraction(power == m - 1)] for power in range(m)]
    kernel = [[point**power / own for power in range(3)] for point, own in zip(points, scale, strict=True)]
    tile = [[*_polynomial(rest), Fraction(0)] for rest in others]
    whole = (back, [*kernel, [Fraction(power == 2) for power in range(3)]], [*tile, _polynomial(points)])
    back_, kernel_, tile_ = (np.array(item, dtype=np.float64) for item in whole)
    return back_, kernel_, tile_


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Its coefficients, that of the least power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [up - root * own for up, own in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


if __name__ == "__main__":
    main()
