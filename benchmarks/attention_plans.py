"""Which forms of attention TensorRT-RTX fuses: ``python -m benchmarks.attention_plans``. Needs no GPU.

A plan of each form, ``LAYERS`` attentions in a row in float16, is built for one shape. Its time is unknown without a
GPU that runs it, but the memory that it will take is stated: a fused attention never holds all its logits, any other
does.
Writes ``results/attention-plans-…``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.attention_forms import OPSETS, Shape, model
from benchmarks.attention_gpu import SHAPES
from benchmarks.machine import RESULTS, machine, origin
from calotype.engine.build import build_plan
from calotype.runtime.errors import BuildError
from calotype.runtime.sessions.libraries import Library, load_library

BACKEND = "tensorrt-rtx"
FLOAT16 = 2  # bytes


def main() -> None:
    """Build, print, write."""
    library = load_library(BACKEND)
    about = {**origin("python -m benchmarks.attention_plans", "benchmarks", "engine"), "machine": machine()}
    report: dict[str, Any] = {**about, "library": f"{library.name} {library.version}", "rows": []}
    for title, shape in SHAPES.items():
        report["rows"].append({"attention": title, "shape": shape._asdict(), **row(library, shape)})
        print(json.dumps(report["rows"][-1]), flush=True)
    (RESULTS / f"attention-plans-{about['date']}.json").write_text(json.dumps(report, indent=2) + "\n")


def row(library: Library, shape: Shape) -> dict[str, Any]:
    """Bytes of one attention's logits, and of the activations that a plan of each form states, or why there is none."""
    inputs = {name: (size,) * 3 for name, size in shape.tensors().items() if name != "out"}
    activations: dict[str, int | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in OPSETS:
            path = Path(folder) / "attention.onnx"
            path.write_bytes(model(form, shape).SerializeToString())
            try:
                activations[form] = int(build_plan(library, path, [inputs]).figures["activations"])
            except BuildError as error:
                activations[form] = str(error)
    logits = FLOAT16 * shape.rows * shape.heads * shape.queries * shape.keys
    return {"logits": logits, "activations": activations}


if __name__ == "__main__":
    main()
