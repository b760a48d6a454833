"""What pays in a UNet on CUDA.

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks import gpu
from benchmarks.micro.harness import Figures, Options, Result, times
from benchmarks.subject import MODELS, Subject
from benchmarks.timing import in_turns
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import default_form
from calotype.runtime.diagnostics.verification import image_sizes
from calotype.runtime.sessions import cuda_fusions, onnxruntime_cuda
from calotype.runtime.sessions.onnxruntime_cuda import OnnxRuntimeCudaSession

RUNS, KERNELS = 5, 40
SECONDS = 240


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to open the UNet.

    Attributes:
        fusions: names in :mod:`calotype.runtime.sessions.cuda_fusions`.
        sums: whether group norms take the sums before them along.
        options: those of ONNX Runtime's CUDA provider.
    """

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


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and where those that are made lie."""
    parser.add_argument("model", nargs="?", default="sd1", choices=MODELS)
    parser.add_argument("--work", type=Path, default=Path(".work/gpu"), help="keeps the models that are made")


def rows(options: Options) -> Iterator[Result]:
    """One row of all variants, again after each: a crash leaves what was measured before it."""
    options.about |= gpu.about(need_gpu=True)
    options.about |= {"variant": options.own.model, "runs": RUNS}
    subject = Subject(model=options.own.model, backend="cuda", work=options.own.work, rounds=options.rounds)
    forms: dict[str, Figures] = {}
    for variant, found in measured(subject, options.some(VARIANTS)):
        forms.setdefault(variant, {}).update(found)
        yield Result(title=f"a guided step of {options.own.model}'s UNet", forms=forms)


def measured(subject: Subject, left: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of the variants of these names, from a process of its own.

    Where that one ends before its time, another begins without the variant at which it ended.
    """
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
            tell(name, {"off": float(f"{off:.1e}"), "open_and_first_runs_s": [round(item, 2) for item in seconds]})
        tell("times")
        for name, own in _timed(opened, sizes, subject.rounds).items():
            tell(name, own)
        tell("kernels")
        for name in [name for name in (PLAIN, ALL) if name in opened]:
            kernels = _kernels(functools.partial(opened[name].run, sizes))
            if kernels:
                tell(name, {"kernels": kernels})


def _opened(bundle: Bundle, variant: Variant) -> OnnxRuntimeCudaSession:
    fusions = tuple(getattr(cuda_fusions, name) for name in variant.fusions)
    settings, spec = {**onnxruntime_cuda.SETTINGS, **NONE, **variant.options}, bundle.manifest.networks["unet"]
    with mock.patch.multiple(onnxruntime_cuda, FUSIONS=fusions, SUMS=variant.sums, SETTINGS=settings):
        return OnnxRuntimeCudaSession(bundle.path, spec, form=default_form(spec, "cuda"))


def _made(session: OnnxRuntimeCudaSession, sizes: Mapping[str, int], seconds: list[float]) -> NDArray[np.float64]:
    """What a session computes of random numbers; its first run, and the second, which is recorded, take a while."""
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


def _timed(opened: Mapping[str, OnnxRuntimeCudaSession], sizes: Mapping[str, int], rounds: int) -> dict[str, Figures]:
    def runs(session: OnnxRuntimeCudaSession) -> None:
        for _ in range(RUNS):
            session.run(sizes)

    # What the one before it left in the caches is gone after a run that is not counted.
    before = {name: functools.partial(session.run, sizes) for name, session in opened.items()}
    forms = {name: functools.partial(runs, session) for name, session in opened.items()}
    seconds, _ = in_turns(forms, rounds, warm_up=0, before=before)
    return times(seconds, 1 / RUNS)


def _kernels(run: Callable[[], None]) -> list[list[Any]]:
    """The kernels that a run spends most time in: microseconds, how often, name; none where PyTorch has no CUDA."""
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
