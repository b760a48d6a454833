"""One ONNX ``Attention`` node or its parts, on the CPU.

The same attention is written as opset 23's ``Attention`` and as MatMul, Softmax, MatMul of opset 20. Both run in ONNX
Runtime in float32 on one thread; what counts is the processor's time, which other programs on the machine hardly
change.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.micro.harness import Figures, Options, Row, Seconds

# By title: rows, heads, queries, keys, channels of a head.
SHAPES = {
    "talbot, 8x8 latents, self": (2, 4, 64, 64, 24),
    "SD 1.5 at 256, self": (2, 8, 1024, 1024, 40),
    "SD 1.5 at 256, prompt": (2, 8, 1024, 77, 40),
    "SD 1.5 at 512, self, second level": (2, 8, 1024, 1024, 80),
    "SDXL at 512, self, deepest level": (2, 20, 256, 256, 64),
    "VAE at 256, pixels": (1, 1, 1024, 1024, 512),
}


def rows(options: Options) -> Iterator[Row]:
    """Both forms of each shape; they have to agree."""
    for title, shape in options.some(SHAPES.items()):
        yield row(title, *shape)


def row(title: str, count: int, heads: int, queries: int, keys: int, channels: int) -> Row:
    """Both forms of one shape."""
    rng = np.random.default_rng(0)
    feeds = {
        "q": rng.standard_normal((count, heads, queries, channels), np.float32),
        "k": rng.standard_normal((count, heads, keys, channels), np.float32),
        "v": rng.standard_normal((count, heads, keys, channels), np.float32),
    }
    sessions = {"one node": session(one_node(), 23), "parts": session(parts(channels), 20)}
    return Row(
        title=title,
        forms={form: functools.partial(opened.run, None, feeds) for form, opened in sessions.items()},
        more=_agree,
        facts={"shape": [count, heads, queries, keys, channels], "clock": "processor"},
        clock=time.process_time,
    )


def _agree(made: Mapping[str, Any], _: Seconds) -> dict[str, Figures]:
    np.testing.assert_allclose(made["one node"][0], made["parts"][0], atol=1e-5)
    return {}


def one_node() -> list[onnx.NodeProto]:
    """Attention as this project exports it."""
    return [helper.make_node("Attention", ["q", "k", "v"], ["out"])]


def parts(channels: int) -> list[onnx.NodeProto]:
    """Attention as exporters write it before opset 23."""
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [channels**-0.5])
    return [
        helper.make_node("Constant", [], ["scale"], value=scale),
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "turned"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["out"]),
    ]


def session(nodes: list[onnx.NodeProto], opset: int) -> Any:
    """The nodes in ONNX Runtime, with dynamic sizes, on one thread."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "h", None, None])
        for name in ("q", "k", "v", "out")
    ]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
