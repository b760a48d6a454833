"""One ONNX ``Attention`` node or its parts: ``python -m benchmarks.attention``. Medians on the CPU, as JSON.

The same attention is written as opset 23's ``Attention`` and as MatMul, Softmax, MatMul of opset 20. Both run in ONNX
Runtime on the CPU in float32, on one thread, and take turns; what counts is the processor's time, which other programs
on the machine hardly change. With ``--backend cuda``, ``tensorrt-rtx`` or ``tensorrt`` it is
:mod:`benchmarks.attention_gpu` that measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from benchmarks.machine import machine, origin

ROUNDS = 5
# What it is, rows, heads, queries, keys, channels of a head.
SHAPES = (
    ("talbot, 8x8 latents, self", 2, 4, 64, 64, 24),
    ("SD 1.5 at 256, self", 2, 8, 1024, 1024, 40),
    ("SD 1.5 at 256, prompt", 2, 8, 1024, 77, 40),
    ("SD 1.5 at 512, self, second level", 2, 8, 1024, 1024, 80),
    ("SDXL at 512, self, deepest level", 2, 20, 256, 256, 64),
    ("VAE at 256, pixels", 1, 1, 1024, 1024, 512),
)


def main() -> None:
    """Measure here or on the GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description="Measure forms of attention.")
    parser.add_argument("--backend", choices=("cpu", "cuda", "tensorrt-rtx", "tensorrt"), default="cpu")
    parser.add_argument("--output", type=Path, help="the file of a GPU's results; the CPU's are printed")
    options = parser.parse_args()
    if options.backend == "cpu":
        on_cpu()
        return
    from benchmarks import attention_gpu  # which needs what a GPU's machine has

    attention_gpu.main(options.backend, options.output)


def on_cpu() -> None:
    """Measure, print."""
    rows = []
    for name, *shape in SHAPES:
        sessions = {"Attention": session(one_node(*shape), 23), "parts": session(parts(*shape), 20)}
        rng = np.random.default_rng(0)
        batch, heads, queries, keys, channels = shape
        feeds = {
            "q": rng.standard_normal((batch, heads, queries, channels), np.float32),
            "k": rng.standard_normal((batch, heads, keys, channels), np.float32),
            "v": rng.standard_normal((batch, heads, keys, channels), np.float32),
        }
        seconds: dict[str, list[float]] = {form: [] for form in sessions}
        made: dict[str, NDArray[Any]] = {}
        for _ in range(ROUNDS):
            for form, opened in sessions.items():
                start = time.process_time()
                (made[form],) = opened.run(None, feeds)
                seconds[form].append(time.process_time() - start)
        np.testing.assert_allclose(made["Attention"], made["parts"], atol=1e-5)
        medians = {form: round(statistics.median(values) * 1e3, 2) for form, values in seconds.items()}
        rows.append({"attention": name, "shape": shape, "median_processor_ms": medians})
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    report = {**origin("python -m benchmarks.attention"), "machine": machine() | versions}
    print(json.dumps({**report, "rounds": ROUNDS, "rows": rows}, indent=2))


def one_node(*_: int) -> list[onnx.NodeProto]:
    """As this project exports it."""
    return [helper.make_node("Attention", ["q", "k", "v"], ["out"])]


def parts(*shape: int) -> list[onnx.NodeProto]:
    """As exporters write it before opset 23."""
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [shape[-1] ** -0.5])
    return [
        helper.make_node("Constant", [], ["scale"], value=scale),
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "turned"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["out"]),
    ]


def session(nodes: list[onnx.NodeProto], opset: int) -> Any:
    """The nodes, opened, with dynamic sizes."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "h", None, None])
        for name in ("q", "k", "v", "out")
    ]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
