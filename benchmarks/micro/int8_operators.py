"""Operators in eight-bit integers, in the shapes of SD 1.5's UNet: each way to compute them, and how far it strays.

``off`` is the root mean square of the difference from float32 over that of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.micro.harness import Figures, Options, Row, Seconds
from benchmarks.micro.operators import node, opened
from calotype.engine import int8
from calotype.engine.graph import CONTRIB

# Of two rows at 256 x 256 pixels: tokens, channels in and out; channels in and out, side.
PRODUCTS = ((2048, 320, 2560), (512, 640, 640), (512, 640, 5120), (128, 1280, 10240), (128, 5120, 1280))
CONVOLUTIONS = ((320, 320, 32), (960, 320, 32), (640, 640, 16), (1280, 1280, 8))


def rows(options: Options) -> Iterator[Row]:
    """Every way of each operator."""
    titles: dict[str, Any] = {
        f"product {' x '.join(map(str, shape))}": functools.partial(product, *shape) for shape in PRODUCTS
    }
    titles |= {
        f"convolution {shape[0]} to {shape[1]} channels at {shape[2]} x {shape[2]}": functools.partial(
            convolution, *shape
        )
        for shape in CONVOLUTIONS
    }
    for title, make in options.some(titles.items()):
        yield row(title, *make())


def row(title: str, sessions: Mapping[str, Any], x: NDArray[np.float32]) -> Row:
    """Sessions that compute ``y`` from ``x``; the first is exact."""
    forms = {form: functools.partial(session.run, ["y"], {"x": x}) for form, session in sessions.items()}
    return Row(title=title, forms=forms, more=_off)


def _off(made: Mapping[str, Any], _: Seconds) -> dict[str, Figures]:
    (exact,) = made["float32"]
    return {
        form: {"off": round(float(np.sqrt(np.square(y - exact).mean() / np.square(exact).mean())), 4)}
        for form, (y,) in made.items()
    }


def product(tokens: int, width: int, out: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Dynamic ranges, fixed ones of either sign, and blocks of 32 weights with a scale each."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((tokens, width), np.float32), rng.standard_normal((width, out), np.float32) / 50
    q, s = int8.per_channel(w, axis=1)
    blocks = np.ascontiguousarray(w.T).reshape(out, width // 32, 32)
    scales = np.abs(blocks).max(2) / np.float32(127)
    bytes_ = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
    unit = np.float32(np.abs(x).max() / 127)
    rounded = {"q": q, "s": s, "unit": unit}
    multiplied = node("MatMulIntegerToFloat", "x8 q unit s zero", "y", domain=CONTRIB)
    fixed = [node("QuantizeLinear", "x unit zero", "x8"), multiplied]
    how = {"K": width, "N": out, "bits": 8, "block_size": 32, "accuracy_level": 4, "domain": CONTRIB}
    return {
        "float32": opened([node("MatMul", "x w", "y")], {"w": w}),
        "range of its own": opened([node("DynamicQuantizeLinear", "x", "x8 unit zero"), multiplied], {"q": q, "s": s}),
        "range given": opened(fixed, {**rounded, "zero": np.uint8(128)}),
        "range given, signed": opened(fixed, {**rounded, "zero": np.int8(0)}),
        "blocks": opened([node("MatMulNBits", "x b s", "y", **how)], {"b": bytes_, "s": scales.reshape(-1)}),
    }, x


def convolution(channels: int, out: int, side: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Fixed ranges of either sign, and ``ConvInteger``, which leaves its integers to other nodes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, side, side), np.float32)
    w = rng.standard_normal((out, channels, 3, 3), np.float32) / 50
    plain = opened([node("Conv", "x w", "y", pads=[1] * 4)], {"w": w})
    y = plain.run(["y"], {"x": x})[0]
    q, s = int8.per_channel(w, axis=0)
    given = {"q": q, "s": s, "unit": np.float32(np.abs(x).max() / 127), "out": np.float32(np.abs(y).max() / 127)}
    given["none"] = np.zeros(out, np.int8)
    fixed = [
        node("QuantizeLinear", "x unit zero", "x8"),
        node("QLinearConv", "x8 unit zero q s none out zero", "y8", pads=[1] * 4),
        node("DequantizeLinear", "y8 out zero", "y"),
    ]
    own = [
        node("DynamicQuantizeLinear", "x", "x8 unit zero"),
        node("ConvInteger", "x8 q zero", "y32", pads=[1] * 4),
        node("Cast", "y32", "whole", to=onnx.TensorProto.FLOAT),
        node("Mul", "unit s", "scale"),
        node("Mul", "whole scale", "y"),
    ]
    return {
        "float32": plain,
        "range given": opened(fixed, {**given, "zero": np.uint8(128)}),
        "range given, signed": opened(fixed, {**given, "zero": np.int8(0)}),
        "ConvInteger": opened(own, {"q": q, "s": s.reshape(1, -1, 1, 1)}),
    }, x
