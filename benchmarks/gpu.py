"""Everything that a GPU run shows: ``python -m benchmarks.gpu [talbot] [sd1] [sdxl]``, by default all, in one go.

Models of real size are made on the spot with random weights and exported in float16. Each backend that is there is
compared, stage by stage, with ONNX Runtime on the CPU in float32; then timed by stage, by step and by picture, with
guidance at the model's own size, batch 1: 20 steps for talbot, 50 for sd1, 30 for sdxl. PyTorch in float16, eager and
compiled, runs the same UNet call in the same process. The host's share is a step's time less what the session takes for
its run. Written to ``benchmarks/results/<gpu>-<date>.json``. Without a GPU it says so and stops.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calotype.engine.build import build_bundle
from calotype.engine.profiles import default_profile
from calotype.runtime.bundle import Bundle
from calotype.runtime.errors import CalotypeError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import obstacle, open_session
from calotype.runtime.sessions.cuda import Cuda, load_cuda
from calotype.runtime.sessions.libraries import installed
from calotype.runtime.verification import verify_graphs

BACKENDS = ("tensorrt", "tensorrt-rtx", "cuda")
MODELS = ("talbot", "sd1", "sdxl")
PACKAGES = ("onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx", "torch", "cuda-bindings", "numpy")
ROUNDS, WARM_UP, SEED = 20, 3, 0
STEPS = {"talbot": 20, "sd1": 50, "sdxl": 30}


def main() -> None:
    """Measure, write, say where."""
    models = sys.argv[1:] or list(MODELS)
    if unknown := set(models) - set(MODELS):
        sys.exit(f"there is no model {', '.join(sorted(unknown))}; valid: {', '.join(MODELS)}")
    try:
        cuda = load_cuda("cuda")
    except CalotypeError as error:
        sys.exit(f"nothing was measured: {error}")
    gpu = cuda.gpu()
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu {' '.join(models)}",
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "gpu": {"name": gpu.name, "capability": gpu.capability, "memory_gib": round(gpu.memory / 2**30, 1)},
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "models": {},
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = Path(__file__).parent / "results" / f"{name}-{dt.datetime.now(dt.UTC):%Y-%m-%d}.json"
    for model in models:
        with _bundle(model) as bundle:
            report["models"][model] = {backend: _measured(bundle, model, backend, cuda) for backend in BACKENDS}
            report["models"][model]["pytorch"] = _pytorch(model, bundle)
        path.write_text(json.dumps(report, indent=2) + "\n")  # after each, so that a crash keeps what was measured
    print(path)


@contextlib.contextmanager
def _bundle(model: str) -> Iterator[Bundle]:
    if model == "talbot":
        yield Bundle.open(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "checkpoint", Path(folder) / "bundle"
        make = f"import benchmarks.checkpoints as c; c.make({model!r}, {str(source)!r})"
        subprocess.run([sys.executable, "-c", make], check=True)
        subprocess.run([sys.executable, "-m", "calotype.runtime", "export", source, target], check=True)
        yield Bundle.open(target)


def _measured(bundle: Bundle, model: str, backend: str, cuda: Cuda) -> dict[str, Any]:
    """One backend's figures, or why there are none; what fails is part of the report."""
    if backend != "cuda" and not installed(backend):
        return {"not_run": "not installed"}
    try:
        start = time.perf_counter()
        if backend != "cuda":
            build_bundle(bundle, backend=backend, profiles=[default_profile(bundle.manifest, static=True)])
            build_bundle(bundle, backend=backend)
        built = time.perf_counter() - start
        reason = obstacle(backend, bundle.path)
        if reason is not None:
            return {"not_run": reason}
        parity = {
            what: {"max_relative": figures.max_relative, "min_cosine": figures.min_cosine}
            for what, figures in verify_graphs(bundle, backend)
        }
        return {
            "build_seconds": round(built, 1),
            "parity": parity,
            "stages_ms": _stages(bundle, backend),
            **_pictures(bundle, backend, cuda, STEPS[model]),
        }
    except CalotypeError as error:
        return {"failed": str(error)}


def _sizes(bundle: Bundle) -> dict[str, int]:
    manifest = bundle.manifest
    latents = {name: getattr(manifest.defaults, name) // manifest.vae.downscale for name in ("height", "width")}
    length = max(tokenizer.max_length for tokenizer in manifest.tokenizers.values())
    return {"batch": 1, "rows": 2, "extra": 1, "tokens": length, **latents}


def _stages(bundle: Bundle, backend: str) -> dict[str, dict[str, float]]:
    """Each network alone: copies in, run, copies out."""
    found, sizes = {}, _sizes(bundle)
    for name, spec in bundle.manifest.networks.items():
        with open_session(bundle.path, spec, backend) as session:
            session.reserve(sizes)
            for item in session.inputs:
                session.buffer(item.name, sizes)[:] = 0
            found[name] = _timed(lambda: session.run(sizes))
    return found


def _timed(call: Callable[[], Any]) -> dict[str, float]:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median": round(statistics.median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


def _pictures(bundle: Bundle, backend: str, cuda: Cuda, steps: int) -> dict[str, Any]:
    """Whole pictures, their memory, and how far the first is from the CPU's (for talbot; others take hours there)."""
    before = cuda.free_memory()
    settings: dict[str, Any] = {"seed": SEED, "num_inference_steps": steps, "output_type": "np"}
    with Pipeline.load(bundle.path, backend) as pipeline:
        run = pipeline._sessions["unet"].run
        inside: list[float] = []

        def counted(sizes: Any) -> None:
            start = time.perf_counter()
            run(sizes)
            inside.append(time.perf_counter() - start)

        picture = _timed(lambda: pipeline("a lighthouse at dusk", **settings))
        pipeline._sessions["unet"].run = counted  # type: ignore[method-assign]
        result = pipeline("a lighthouse at dusk", **settings)
        times = result.timings["steps"]
        memory = before - cuda.free_memory()
    figures = {
        "picture_ms": picture,
        "step_ms": round(statistics.median(times) * 1e3, 3),
        "host_us_per_step": round(statistics.median(a - b for a, b in zip(times, inside, strict=True)) * 1e6, 1),
        "gpu_memory_mib": round(memory / 2**20),
    }
    if bundle.manifest.name == "talbot":
        with Pipeline.load(bundle.path, "cpu") as pipeline:
            wanted = pipeline("a lighthouse at dusk", **settings).images[0]
        error = float(np.mean((wanted.astype(np.float64) - result.images[0]) ** 2))
        figures["picture_psnr_db"] = round(-10 * np.log10(error), 1)
    return figures


def _pytorch(model: str, bundle: Bundle) -> dict[str, Any]:
    """The UNet call of a guided step in PyTorch, eager and compiled, float16, random weights of the same shapes."""
    if model == "talbot":
        return {"not_run": "a PyTorch checkpoint of talbot is not part of the repository"}
    import torch

    if not torch.cuda.is_available():
        return {"not_run": "this PyTorch has no CUDA"}
    build, config = importlib.import_module("benchmarks.checkpoints").SIZES[model]["unet"]
    unet = build(config).to("cuda", torch.float16).eval()
    sizes = _sizes(bundle)
    inputs = [
        torch.zeros(spec.resolve(sizes), dtype=torch.float16, device="cuda")
        for spec in bundle.manifest.networks["unet"].inputs
    ]
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, module in (("eager", unet), ("compiled", torch.compile(unet, mode="max-autotune"))):

            def call(module: Any = module) -> None:
                module(*inputs)
                torch.cuda.synchronize()

            torch.cuda.reset_peak_memory_stats()
            found[f"{name}_ms"] = _timed(call)
            found[f"{name}_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


def _output(*command: str) -> str | None:
    """None where there is no such program, or it fails: a copy has no history, a container perhaps no nvidia-smi."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
