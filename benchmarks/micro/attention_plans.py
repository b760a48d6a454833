"""Which forms of attention TensorRT-RTX fuses, told by the memory of their plans; no GPU is needed.

A plan of each form, ``LAYERS`` attentions in a row in float16, is built for one shape. Its time is unknown without a
GPU that runs it, but the memory that it will take is stated: a fused attention never holds all its logits, any other
does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.micro.attention_forms import OPSETS, Shape, model
from benchmarks.micro.attention_gpu import SHAPES
from benchmarks.micro.harness import Figures, Options, Result
from calotype.engine.build import build_plan
from calotype.runtime.errors import BuildError
from calotype.runtime.sessions.libraries import Library, load_library

BACKEND = "tensorrt-rtx"
FLOAT16 = 2  # bytes


def rows(options: Options) -> Iterator[Result]:
    """Every form of each shape."""
    library = load_library(BACKEND)
    options.about["library"] = f"{library.name} {library.version}"
    for title, shape in options.some(SHAPES.items()):
        yield row(library, title, shape)


def row(library: Library, title: str, shape: Shape) -> Result:
    """MiB of activations that a plan of each form states, or why there is none, beside those of one's logits."""
    inputs = {name: (size,) * 3 for name, size in shape.tensors().items() if name != "out"}
    forms: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in OPSETS:
            path = Path(folder) / "attention.onnx"
            path.write_bytes(model(form, shape).SerializeToString())
            try:
                forms[form] = {"mib": mib(int(build_plan(library, path, [inputs]).figures["activations"]))}
            except BuildError as error:
                forms[form] = {"failed": str(error)}
    logits = FLOAT16 * shape.rows * shape.heads * shape.queries * shape.keys
    return Result(title=title, forms=forms, facts={"shape": list(shape), "logits_mib": mib(logits)})


def mib(count: int) -> float:
    """Bytes as MiB, to a tenth."""
    return round(count / 2**20, 1)
