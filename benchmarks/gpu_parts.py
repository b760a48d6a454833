"""What a GPU run measures of one model on one backend, part by part, and of the same UNet in PyTorch.

Every network, and a whole picture, is compared with ONNX Runtime on the CPU in float32: talbot at its own size, the
others at the least size of the default profile (half the model's own: 256 pixels for sd1, 512 for sdxl) and in few
steps, since the CPU takes its time.
Times are with guidance, at the model's own size; prompts change with each call, else the text encoder's work is kept.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_diffusers import DiffusersParts
from benchmarks.subject import SEED, STEPS, WARM_UP, NotRunError, Parts, Subject
from calotype.engine.build import build_bundle
from calotype.engine.profiles import Profile, Range, default_profile
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.diagnostics.benchmark import PROMPT, latency
from calotype.runtime.diagnostics.verification import compare_graphs, image_sizes
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import obstacle, open_session
from calotype.runtime.sessions.cuda import Cuda, load_cuda
from calotype.runtime.sessions.libraries import installed
from calotype.runtime.sessions.session import Session

TRAINED = ("talbot",)
BACKENDS = ("cuda", "pytorch", "diffusers", "tensorrt-rtx", "tensorrt")
PARITY_STEPS = {"talbot": 20, "sd1": 4, "sdxl": 2}
# How torch.compile is called, by the name of the part; the second takes minutes.
COMPILED: dict[str, dict[str, Any]] = {"compiled": {"mode": "reduce-overhead"}, "autotuned": {"mode": "max-autotune"}}


def measure(subject: Subject, tell: Callable[..., None]) -> None:
    """Tell the name of each part when it begins, and name and figures, or ``failed``, when it is done."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(_line(record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("calotype").addHandler(handler)
    try:
        for name, part in parts(subject).items():
            tell(name)
            try:
                value = part()
            except NotRunError as reason:
                value = {"not_run": str(reason)}
            except Exception as error:  # whatever it is: the other parts are measured even so
                value = {"failed": _line(f"{type(error).__name__}: {error}")}
            tell(name, value)
            if name == "ready" and ("not_run" in value or "failed" in value):
                return
        if warnings:
            tell("warnings", warnings)
    finally:
        logging.getLogger("calotype").removeHandler(handler)


def parts(subject: Subject) -> Parts:
    """What is measured, in this order; nothing follows where the first, ``ready``, fails."""
    if subject.backend == "model":
        return {"ready": lambda: {"bundle": subject.bundle().name}}
    found = OTHERS.get(subject.backend, BackendParts)(subject).all()
    return {name: part for name, part in found.items() if name in ("ready", *(subject.parts or found))}


class BackendParts:
    """What is measured of one backend of the runtime."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.steps = subject.steps or STEPS[subject.model]

    def all(self) -> Parts:
        """By name."""
        return {
            "ready": self.ready,
            "parity": self.parity,
            "picture_parity": self.picture_parity,
            "stages_ms": self.stages,
            "unet_rows_ms": self.rows,
            "pictures": self.pictures,
            "images_in_a_call": self.images,
            "low_memory": self.low_memory,
        }

    def ready(self) -> dict[str, Any]:
        """Plans are built, or taken from the cache, and the GPU's free memory is noted; the size that times are of."""
        backend, start = self.subject.backend, time.perf_counter()
        if backend.startswith("tensorrt") and not installed(backend):
            raise NotRunError(f"{backend} is not installed")
        self.bundle = Bundle.open(self.subject.bundle())
        height = default_profile(self.bundle.manifest).height
        # Below the size that a model is trained for a detail may fall out either way, by a rounding.
        self.pixels = height.opt if self.subject.model in TRAINED else height.min
        if backend.startswith("tensorrt"):
            build_bundle(self.bundle, backend=backend, profiles=self._profiles())
        reason = obstacle(backend, self.bundle.path)
        if reason is not None:
            raise NotRunError(reason)
        self.cuda: Cuda | None = None if backend == "cpu" else load_cuda(backend)
        self.free = self._free()
        seconds = round(time.perf_counter() - start, 1)
        return {"seconds": seconds, "pixels": self.bundle.manifest.defaults.height}

    def parity(self) -> dict[str, Any]:
        """Of every network."""
        sizes = image_sizes(self.bundle.manifest, self.pixels, self.pixels)
        found: dict[str, Any] = {"pixels": self.pixels}
        for what, figures, trouble in compare_graphs(self.bundle, self.subject.backend, sizes):
            found[what] = dataclasses.asdict(figures) | ({} if trouble is None else {"trouble": trouble})
        return found

    def picture_parity(self) -> dict[str, Any]:
        """Of a whole picture, and how far pictures drawn again are from the first; None dB is equal."""
        steps, repeats = min(self.steps, PARITY_STEPS[self.subject.model]), self.subject.repeats
        pixels = {"height": self.pixels, "width": self.pixels}

        def drawn(backend: str, times: int) -> list[NDArray[np.float32]]:
            with Pipeline.load(self.bundle.path, backend) as pipeline:
                settings: dict[str, Any] = {**pixels, "seed": SEED, "num_inference_steps": steps, "output_type": "np"}
                return [pipeline(PROMPT, **settings).images[0] for _ in range(times)]

        (wanted,) = drawn("cpu", 1)
        first, *others = drawn(self.subject.backend, 1 + repeats)
        again = [distance for other in others if (distance := psnr(first, other)) is not None]
        return {
            "pixels": self.pixels,
            "steps": steps,
            "psnr_db": psnr(wanted, first),
            "repeats": repeats,
            "repeats_equal": repeats - len(again),
            "repeat_psnr_db": min(again, default=None),
        }

    def stages(self) -> dict[str, Any]:
        """Each network alone: copies in, run, copies out."""
        return {name: self._timed_network(name, 2) for name in self._networks()}

    def rows(self) -> dict[str, Any]:
        """The UNet by the rows of one run, of which a guided picture takes two."""
        return {str(2 * images): self._timed_network("unet", 2 * images) for images in self.subject.images}

    def pictures(self) -> dict[str, Any]:
        """Whole pictures, from the prompt to pixels on the host."""
        with Pipeline.load(self.bundle.path, self.subject.backend) as pipeline:
            draw = Drawing(pipeline, self.steps)
            picture = timed(draw, self.subject.rounds)
            memory = self._used()
            inside = counted(pipeline.networks.session(SessionKey("unet", pipeline.networks.form("unet"))))
            timings = draw().timings
        host = [whole - run for whole, run in zip(timings.runs, inside, strict=True)]
        return {
            "steps": self.steps,
            "picture_ms": picture,
            "step_ms": round(statistics.median(timings.runs) * 1e3, 3),
            "host_us_per_step": round(statistics.median(host) * 1e6, 1),
            "stages_ms": {
                name: round(getattr(timings, name) * 1e3, 3) for name in ("text_encoder", "denoising", "vae_decoder")
            },
            "gpu_memory_mib": memory,
        }

    def images(self) -> list[dict[str, Any]]:
        """Several pictures in a call."""
        with Pipeline.load(self.bundle.path, self.subject.backend) as pipeline:
            return [latency(pipeline, images=images, steps=self.steps) for images in self.subject.images]

    def low_memory(self) -> dict[str, Any]:
        """One picture with one network open at a time, and the most memory at the end of any step or the picture."""
        with Pipeline.load(self.bundle.path, self.subject.backend, low_memory=True) as pipeline:
            seen: list[float | None] = []
            draw = Drawing(pipeline, self.steps, lambda _: seen.append(self._used()))
            draw()
            picture = timed(draw, 1)
            seen.append(self._used())
        return {"picture_ms": picture, "gpu_memory_mib": max((size for size in seen if size is not None), default=None)}

    def _profiles(self) -> list[Profile]:
        """One shape, and one profile for all others that are run here."""
        manifest = self.bundle.manifest
        wide = dataclasses.replace(
            default_profile(manifest), batch=Range(min=1, opt=2, max=2 * max(self.subject.images))
        )
        return [default_profile(manifest, static=True), wide]

    def _networks(self) -> Sequence[str]:
        return [name for name in self.bundle.manifest.networks if not name.startswith("unet_")]

    def _timed_network(self, name: str, rows: int) -> dict[str, float]:
        sizes = image_sizes(self.bundle.manifest) | {"rows": rows}
        with open_session(self.bundle.path, self.bundle.manifest.networks[name], self.subject.backend) as session:
            session.reserve(sizes)
            for item in session.inputs:
                session.buffer(item.name, sizes)[:] = 0
            return timed(lambda: session.run(sizes), self.subject.rounds)

    def _free(self) -> int:
        return 0 if self.cuda is None else self.cuda.free_memory()

    def _used(self) -> float | None:
        """MiB of GPU memory since ``ready``."""
        return None if self.cuda is None else round((self.free - self._free()) / 2**20, 1)


class Drawing:
    """A picture a call, each of another prompt."""

    def __init__(self, pipeline: Pipeline, steps: int, callback: Callable[[Any], None] | None = None) -> None:
        self._pipeline, self._steps, self._callback, self._number = pipeline, steps, callback, 0

    def __call__(self) -> Any:
        """The pipeline's output."""
        self._number += 1
        return self._pipeline(
            f"{PROMPT}, number {self._number}",
            seed=SEED,
            num_inference_steps=self._steps,
            callback_on_step_end=self._callback,
        )


class PyTorchParts:
    """The UNet call of a guided step in PyTorch, random weights, float16 on a GPU."""

    def __init__(self, subject: Subject, device: str = "cuda") -> None:
        self.subject, self.device = subject, device

    def all(self) -> Parts:
        """By name."""
        compiled = {name: lambda how=how: self._timed(how) for name, how in COMPILED.items()}
        return {"ready": self.ready, "eager": lambda: self._timed(None), **compiled}

    def ready(self) -> dict[str, Any]:
        """The module and its inputs."""
        import torch

        from benchmarks.checkpoints import SIZES
        from calotype.export.models.unet import UNet
        from training.config import TALBOT

        if self.device == "cuda" and not torch.cuda.is_available():
            raise NotRunError("this PyTorch has no CUDA")
        torch.backends.cudnn.benchmark = True
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        config: Any = TALBOT.unet if self.subject.model == "talbot" else SIZES[self.subject.model]["unet"][1]
        self.module = UNet(config).to(self.device, dtype).eval()
        manifest = Bundle.open(self.subject.bundle()).manifest
        sizes = image_sizes(manifest)
        self.inputs = {
            spec.name: torch.zeros(spec.resolve(sizes), dtype=dtype, device=self.device)
            for spec in manifest.networks["unet"].inputs
        }
        return {"rows": sizes["rows"], "pixels": manifest.defaults.height, "dtype": str(dtype)}

    def _timed(self, how: dict[str, Any] | None) -> dict[str, Any]:
        """A call, waited for, and the most memory that PyTorch took for it."""
        import torch

        cuda = torch.cuda if self.device == "cuda" else None
        module = self.module if how is None else torch.compile(self.module, **how)

        def call() -> None:
            with torch.inference_mode():
                module(**self.inputs)
            if cuda is not None:
                cuda.synchronize()

        if cuda is not None:
            cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        figures = timed(call, self.subject.rounds)
        memory = None if cuda is None else round(cuda.max_memory_reserved() / 2**20)
        return {"call_ms": figures, "first_call_s": round(first, 1), "gpu_memory_mib": memory}


# What is measured beside the runtime's own backends.
OTHERS: dict[str, Callable[[Subject], Any]] = {"pytorch": PyTorchParts, "diffusers": DiffusersParts}


def counted(session: Session) -> list[float]:
    """Seconds of each run of ``session`` from now on."""
    run, seconds = session.run, list[float]()

    def timed_run(sizes: Mapping[str, int]) -> None:
        start = time.perf_counter()
        run(sizes)
        seconds.append(time.perf_counter() - start)

    session.run = timed_run  # type: ignore[method-assign]
    return seconds


def timed(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds, after a few calls that are not counted."""
    for _ in range(min(WARM_UP, rounds)):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median": round(statistics.median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


def psnr(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    """Decibels between pictures in 0..1; None where they are equal."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return None if error == 0 else round(-10 * float(np.log10(error)), 1)


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
