"""What pays in a UNet on CUDA: ``python -m benchmarks.fusions [MODEL]``, for a GPU.

Sessions of ONNX Runtime that differ in what :mod:`calotype.runtime.sessions.cuda_fusions` puts together, and in the
provider's options, are opened in one process and take turns, at the model's own size with guidance. Each is compared
with one that has none of it. A crash of the GPU's libraries costs the variant that was being opened; what fails is said
in its place. Where PyTorch is there, its profiler says in which kernels the first and the last variant spend their
time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks import gpu
from benchmarks.gpu_parts import MODELS, Subject
from benchmarks.machine import RESULTS, slug
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.diagnostics.verification import image_sizes
from calotype.runtime.sessions import cuda_fusions, onnxruntime_cuda
from calotype.runtime.sessions.onnxruntime_cuda import OnnxRuntimeCudaSession

ROUNDS, RUNS, KERNELS = 20, 5, 40
SECONDS = 240


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Names of :mod:`calotype.runtime.sessions.cuda_fusions`, whether group norms take sums along, and options."""

    fusions: tuple[str, ...] = ()
    sums: bool = False
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


NONE = {"cudnn_conv_algo_search": "HEURISTIC", "fuse_conv_bias": "0"}
EXACT = {"enable_skip_layer_norm_strict_mode": "1"}  # SkipLayerNormalization else adds in half precision
SEARCH = {"cudnn_conv_algo_search": "EXHAUSTIVE"}  # of cuDNN's graphs it is the other of two ways to guess
BIAS = {"fuse_conv_bias": "1"}
NAMES = tuple(fusion.__name__ for fusion in cuda_fusions.FUSIONS)
PLAIN, ALL = "none", "all"
VARIANTS = {
    PLAIN: Variant(),
    "search": Variant(options=SEARCH),
    "bias of convolutions": Variant(options=BIAS),
    "search, bias": Variant(options=SEARCH | BIAS),
    **{name.replace("_", " "): Variant(fusions=(name,), options=EXACT) for name in NAMES},
    "sums": Variant(sums=True),
    "all fusions": Variant(fusions=NAMES, options=EXACT),
    "all fusions, sums": Variant(fusions=NAMES, sums=True, options=EXACT),  # the sessions' own
    "all but bias": Variant(fusions=NAMES, sums=True, options=EXACT | SEARCH),
    "all but sums": Variant(fusions=NAMES, options=EXACT | SEARCH | BIAS),
    ALL: Variant(fusions=NAMES, sums=True, options=EXACT | SEARCH | BIAS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write after every variant, say where."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusions", description="Measure what pays in a UNet.")
    parser.add_argument("model", nargs="?", default="sd1", choices=MODELS)
    parser.add_argument("--work", type=Path, default=Path(".work/gpu"), help="keeps the models that are made")
    parser.add_argument("--output", type=Path, help="the file of results")
    options = parser.parse_args(arguments)
    report = gpu.about(need_gpu=True)
    del report["models"]
    name = slug(report["gpu"]["name"])
    path = options.output or RESULTS / f"fusions-{options.model}-{name}-{report['date']}.json"
    report |= {"command": f"python -m benchmarks.fusions {options.model}", "model": options.model}
    report |= {"rounds": ROUNDS, "runs": RUNS, "variants": {}}
    subject = Subject(model=options.model, backend="cuda", work=options.work)
    for variant, found in measured(subject, list(VARIANTS)):
        print(f"{variant}: {json.dumps(found)[:300]}", file=sys.stderr)
        report["variants"].setdefault(variant, {}).update(found)
        gpu.write(path, report)
    print(path)


def measured(subject: Subject, left: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """In a process of its own; in another without the variant at which it ended, where it ended before its time."""
    deadline = time.monotonic() + SECONDS
    while left:
        crashed = ""
        for variant, found in gpu.run(subject, deadline - time.monotonic(), functools.partial(_variants, left)):
            crashed = ""
            if variant in left:
                yield variant, found
                crashed = variant if "failed" in found and "process ended" in found["failed"] else ""
        left = [variant for variant in left if variant != crashed] if crashed else []


def _variants(names: Sequence[str], subject: Subject, tell: Callable[..., None]) -> None:
    bundle = Bundle.open(subject.bundle())
    sizes, opened, plain = image_sizes(bundle.manifest), dict[str, OnnxRuntimeCudaSession](), None
    with contextlib.ExitStack() as stack:
        for name in names:
            tell(name)
            try:
                start = time.perf_counter()
                session = stack.enter_context(_opened(bundle, VARIANTS[name]))
                seconds = [time.perf_counter() - start]
                made = _made(session, sizes, seconds)
            except Exception as error:  # whatever it is: the other variants are measured even so
                tell(name, {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
                continue
            plain = made if plain is None else plain
            off = float(np.linalg.norm(made - plain) / np.linalg.norm(plain))
            opened[name] = session
            tell(name, {"off": float(f"{off:.1e}"), "seconds": [round(item, 2) for item in seconds]})
        tell("times")
        for name, milliseconds in _timed(opened, sizes).items():
            tell(name, milliseconds)
        tell("kernels")
        for name in [name for name in (PLAIN, ALL) if name in opened]:
            kernels = _kernels(functools.partial(opened[name].run, sizes))
            if kernels:
                tell(name, {"kernels": kernels})


def _opened(bundle: Bundle, variant: Variant) -> OnnxRuntimeCudaSession:
    fusions = tuple(getattr(cuda_fusions, name) for name in variant.fusions)
    settings = {**onnxruntime_cuda.SETTINGS, **NONE, **variant.options}
    with mock.patch.multiple(onnxruntime_cuda, FUSIONS=fusions, SUMS=variant.sums, SETTINGS=settings):
        return OnnxRuntimeCudaSession(bundle.path, bundle.manifest.networks["unet"])


def _made(session: OnnxRuntimeCudaSession, sizes: Mapping[str, int], seconds: list[float]) -> NDArray[np.float64]:
    """What it computes of random numbers; the first run, and the second, which is recorded, take a while."""
    rng = np.random.default_rng(0)
    session.reserve(sizes)
    for item in session.inputs:
        view = session.buffer(item.name, sizes)
        view[:] = 500 if item.name == "timestep" else rng.standard_normal(view.shape)
    for _ in range(3):
        start = time.perf_counter()
        session.run(sizes)
        seconds.append(time.perf_counter() - start)
    return session.buffer(session.outputs[0].name, sizes).astype(np.float64)


def _timed(opened: Mapping[str, OnnxRuntimeCudaSession], sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Milliseconds of a run, and over those of the first in the same round."""
    times: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(ROUNDS):
        for name, session in opened.items():
            session.run(sizes)  # what the one before it left in the caches is gone then
            start = time.perf_counter()
            for _ in range(RUNS):
                session.run(sizes)
            times[name].append((time.perf_counter() - start) * 1e3 / RUNS)
    first = next(iter(times.values()), [])
    return {
        name: {
            "median_ms": round(statistics.median(own), 3),
            "min_ms": round(min(own), 3),
            "ratio": round(statistics.median(one / other for one, other in zip(own, first, strict=True)), 3),
        }
        for name, own in times.items()
    }


def _kernels(run: Callable[[], None]) -> list[list[Any]]:
    """The kernels that a run spends most in: microseconds, how often, name. None of them where PyTorch has no CUDA."""
    try:
        import torch
    except ModuleNotFoundError:
        return []
    if not torch.cuda.is_available():
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    found = sorted(profile.key_averages(), key=lambda item: -item.self_device_time_total)
    return [[round(item.self_device_time_total, 1), item.count, item.key[:160]] for item in found[:KERNELS]]


if __name__ == "__main__":
    main()
