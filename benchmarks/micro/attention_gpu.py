"""Forms of attention on a GPU in float16, in ONNX Runtime on CUDA or in a TensorRT.

Graphs are run as the runtime's sessions run theirs: by the same settings, from GPU memory, as CUDA graphs. Forms take
turns; many runs are queued back to back and timed together, and the time is that of one attention. What fails is said
in its place, and a crash costs its row alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks import gpu
from benchmarks.micro.attention_forms import LAYERS, OPSETS, Shape, model, reference
from benchmarks.micro.harness import Figures, Options, Result, times
from benchmarks.subject import Subject
from benchmarks.timing import in_turns
from calotype.engine.build import build_plan
from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.device import Device, Staging, acquire, release
from calotype.runtime.sessions.libraries import load_library
from calotype.runtime.sessions.onnxruntime_cuda import PROVIDER
from calotype.runtime.sessions.opened_plan import OpenedPlan
from calotype.runtime.sessions.records import PlanRecord

RUNS, WARM_UP = 10, 3
MOST_OFF = 1e-2  # Frobenius norm of the difference from float64, over that of the exact values
COMPARED = 64  # queries, or a few more
SECONDS = 120  # for a backend; what hangs ends here
SHAPES = {
    "SD 1.5 at 512, self, first level": Shape(2, 8, 4096, 4096, 40),
    "SD 1.5 at 512, self, second level": Shape(2, 8, 1024, 1024, 80),
    "SD 1.5 at 512, self, third level": Shape(2, 8, 256, 256, 160),
    "SD 1.5 at 512, self, deepest level": Shape(2, 8, 64, 64, 160),
    "SD 1.5 at 512, prompt, first level": Shape(2, 8, 4096, 77, 40),
    "SDXL at 1024, self, second level": Shape(2, 10, 4096, 4096, 64),
    "SDXL at 1024, self, deepest level": Shape(2, 20, 1024, 1024, 64),
    "SDXL at 1024, prompt, second level": Shape(2, 10, 4096, 77, 64),
    "VAE at 512, pixels": Shape(1, 1, 4096, 4096, 512),
    "talbot, self": Shape(2, 4, 256, 256, 24),
}
# What the session on CUDA makes of the first form.
REWRITTEN = "MultiHeadAttention"

Queue = Callable[[], None]
Some = tuple[NDArray[np.float16], NDArray[np.float64]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The backend."""
    parser.add_argument("--backend", choices=("cuda", "tensorrt-rtx", "tensorrt"), default="cuda")


def rows(options: Options) -> Iterator[Result]:
    """Every form of each shape, measured in processes of their own."""
    backend = options.own.backend
    options.about |= gpu.about(need_gpu=True)
    options.about |= {"variant": backend, "dtype": "float16", "layers": LAYERS, "runs": RUNS}
    for title, forms in measured(backend, options.some(SHAPES), options.rounds):
        forms = {"all": forms} if "failed" in forms else forms
        yield Result(title=title, forms=forms, facts={"shape": list(SHAPES[title])})


def measured(backend: str, left: Sequence[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The shapes of these names in a process of its own; in another, where that one ends before its time."""
    deadline = time.monotonic() + SECONDS
    while left:
        subject = Subject(model="attention", backend=backend, work=Path(), rounds=rounds)
        for title, forms in gpu.run(subject, deadline - time.monotonic(), functools.partial(_rows, left)):
            title = left[0] if title == "start" else title
            if title in left:
                yield title, forms
                left = left[left.index(title) + 1 :]


def _rows(titles: Sequence[str], subject: Subject, tell: Callable[..., None]) -> None:
    for title in titles:
        tell(title)
        try:
            forms = row(subject.backend, SHAPES[title], subject.rounds)
        except Exception as error:
            tell(title, _failed(error))
            return  # the GPU's context may be lost
        tell(title, forms)


def row(backend: str, shape: Shape, rounds: int) -> dict[str, Figures]:
    """The time of one attention in each form, and how far it is off."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        device = acquire(backend)
        stack.callback(release, device)
        tensors = shape.tensors()
        specs = [TensorSpec(name=name, dtype="float16", shape=size) for name, size in tensors.items()]
        staging = Staging(device, specs, {spec.name: spec.count({}) for spec in specs})
        stack.callback(staging.close)
        queues: dict[str, Queue] = {}
        stack.callback(queues.clear)
        exact = _fill(device, staging, shape)
        found: dict[str, Figures] = {}
        for form in (*OPSETS, REWRITTEN) if backend == "cuda" else OPSETS:
            start = time.perf_counter()
            try:
                queues[form], captured = opened(backend, form, shape, device, staging, folder, stack)
                found[form] = {"off": _off(queues[form], device, staging, shape, exact), "cuda_graph": captured}
                found[form]["ready_s"] = round(time.perf_counter() - start, 2)
            except Exception as error:  # whatever it is: the other forms are measured even so
                queues.pop(form, None)
                device.cuda.abandon_capture(device.stream)  # the others' work would be recorded, not done
                found[form] = _failed(error)
        for form, own in _timed(queues, device, rounds).items():
            found[form] = own | found[form]
    return found


def _fill(device: Device, staging: Staging, shape: Shape) -> Some:
    """Put random numbers into the inputs; returns some of the queries, and what attention should add to those."""
    tensors, rng = shape.tensors(), np.random.default_rng(0)
    values = {name: rng.standard_normal(tensors[name], np.float32).astype(np.float16) for name in ("q", "k0", "v0")}
    values["k0"] *= 2  # else every weight is small, and so what attention adds to the queries
    for name, size in tensors.items():
        if name != "out":
            staging.view(name, size)[:] = values[name if name == "q" else f"{name[0]}0"]
            _send(name, device, staging, shape)
    some = values["q"][:, :: _apart(shape)]
    return some, reference(shape, some, values["k0"], values["v0"]) - some


def _off(queue: Queue, device: Device, staging: Staging, shape: Shape, exact: Some) -> float:
    """How far a form is off from what it should compute; too far is an error."""
    some, wanted = exact
    made = _made(queue, device, staging, shape)[:, :: _apart(shape)] - some
    off = float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))
    if not off < MOST_OFF:
        raise ArithmeticError(f"it is off by {off:.1e}")
    return float(f"{off:.1e}")


def _apart(shape: Shape) -> int:
    """Every how many of the queries one is compared."""
    return max(1, shape.queries // COMPARED)


def _failed(error: Exception) -> dict[str, str]:
    return {"failed": " ".join(f"{type(error).__name__}: {error}".split())}


def _send(name: str, device: Device, staging: Staging, shape: Shape) -> None:
    size = 2 * math.prod(shape.tensors()[name])
    device.cuda.copy_to_device(staging.device(name), staging.host(name), size, device.stream)


def _made(queue: Queue, device: Device, staging: Staging, shape: Shape) -> Any:
    """What a form computes; nothing that another has left there."""
    out = staging.view("out", shape.tensors()["out"])
    out[:] = np.nan
    _send("out", device, staging, shape)
    for _ in range(WARM_UP):
        queue()
    device.cuda.copy_to_host(staging.host("out"), staging.device("out"), out.nbytes, device.stream)
    device.cuda.synchronize(device.stream)
    return out.astype(np.float64)


def _timed(queues: Mapping[str, Queue], device: Device, rounds: int) -> dict[str, Figures]:
    def runs(queue: Queue) -> None:
        for _ in range(RUNS):
            queue()
        device.cuda.synchronize(device.stream)

    def refresh(queue: Queue) -> None:  # what the form before it left in the caches is gone then
        queue()
        device.cuda.synchronize(device.stream)

    forms = {form: functools.partial(runs, queue) for form, queue in queues.items()}
    before = {form: functools.partial(refresh, queue) for form, queue in queues.items()}
    seconds, _ = in_turns(forms, rounds, warm_up=0, before=before)
    return times(seconds, 1 / (RUNS * LAYERS))


def opened(
    backend: str, form: str, shape: Shape, device: Device, staging: Staging, folder: Path, stack: contextlib.ExitStack
) -> tuple[Queue, bool]:
    """What queues a form on the device's stream, and whether as a CUDA graph; closed with ``stack``."""
    path = folder / f"{form.replace(' ', '_')}.onnx"
    onnx.save(model("Attention" if form == REWRITTEN else form, shape), path)
    if backend == "cuda":
        return _in_onnxruntime(for_cuda(path)[0] if form == REWRITTEN else path.read_bytes(), device, staging, shape)
    return _in_tensorrt(backend, path, device, staging, shape, stack)


def _in_onnxruntime(graph: bytes, device: Device, staging: Staging, shape: Shape) -> tuple[Queue, bool]:
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    settings = {"user_compute_stream": str(device.stream), "arena_extend_strategy": "kSameAsRequested"}

    def session(captured: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = [(PROVIDER, {**settings, "enable_cuda_graph": captured}), "CPUExecutionProvider"]
        return onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)

    captured = True
    try:
        runs = session("1")
    except Exception:  # a node on the CPU; the library's exceptions have no common class but this
        runs, captured = session("0"), False
    if PROVIDER not in runs.get_providers():
        raise OSError("ONNX Runtime could not load its CUDA provider")
    binding, how = runs.io_binding(), onnxruntime.RunOptions()
    for name, size in shape.tensors().items():
        bind = binding.bind_output if name == "out" else binding.bind_input
        bind(name, "cuda", 0, np.float16, size, staging.device(name))
    how.add_run_config_entry("gpu_graph_id", "1")
    how.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return lambda: runs.run_with_iobinding(binding, how), captured


def _in_tensorrt(
    backend: str, path: Path, device: Device, staging: Staging, shape: Shape, stack: contextlib.ExitStack
) -> tuple[Queue, bool]:
    library, cuda, stream, tensors = load_library(backend), device.cuda, device.stream, shape.tensors()
    built = build_plan(library, path, [{name: (size,) * 3 for name, size in tensors.items() if name != "out"}])
    plan = path.with_suffix(".plan")
    plan.write_bytes(built.plan)
    key = {"version_compatible": False, "stripped": False}
    measures = dataclasses.asdict(FileRecord.of(plan))
    record = PlanRecord(key=key, tensors=built.tensors, figures=built.figures, **measures)
    engine = OpenedPlan(library, device, plan, record, graph=path, weights=path, overrides=None)
    stack.callback(engine.close)
    contexts = [engine.create_context(0)]
    stack.callback(contexts.clear)  # before its engine
    memory = cuda.malloc(max(1, engine.activations(0)))
    stack.callback(cuda.free, memory)
    for name, size in tensors.items():
        if name != "out" and not contexts[0].set_input_shape(name, size):
            raise ValueError(engine.complaint(f"take {name}"))
        contexts[0].set_tensor_address(name, staging.device(name))
    contexts[0].set_device_memory(memory, engine.activations(0))

    def enqueue() -> None:
        if not contexts[0].execute_async_v3(stream):
            raise ValueError(engine.complaint("run the plan"))

    enqueue()
    cuda.synchronize(stream)
    asks = getattr(contexts[0], "is_stream_capturable", None)
    if asks is not None and not asks(stream):
        return enqueue, False
    cuda.begin_capture(stream)
    enqueue()
    graph = cuda.end_capture(stream)
    stack.callback(cuda.destroy_graph, graph)
    return lambda: cuda.launch(graph, stream), True
