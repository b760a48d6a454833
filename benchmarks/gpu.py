"""Everything that a GPU run shows: ``python -m benchmarks.gpu [talbot] [sd1] [sdxl] [--budget SECONDS] …``.

Models of real size are made on the spot with random weights, exported in float16, and kept in ``--work``. What is
measured of each stands in :mod:`benchmarks.gpu_parts`. Each backend runs in a process of its own, so that a crash of
the GPU's libraries costs that backend's next parts alone; what fails, or does not fit into the budget, is said in its
place. ``benchmarks/results/<gpu>.json`` is written after every part, and a later call adds to it; ``--part`` measures
some parts alone and leaves what was measured of the others. Without a GPU it says so and stops, unless ``--backend
cpu`` is asked for, which shows that the measuring works.
Where the sources are a copy, ``BENCHMARK_COMMIT`` in the environment says which commit they are of.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import BACKENDS, measure
from benchmarks.machine import RESULTS, commit, machine, slug, write
from benchmarks.subject import IMAGES, MODELS, REPEATS, ROUNDS, Subject
from calotype.runtime.errors import CalotypeError
from calotype.runtime.sessions.cuda import load_cuda

PACKAGES = (
    *("onnxruntime-gpu", "onnxruntime", "tensorrt-cu13", "tensorrt-rtx", "cuda-bindings"),
    *("torch", "onnx", "onnxscript", "numpy"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, say where."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    report = about(need_gpu=options.backends != ["cpu"])
    report["command"] = f"python -m benchmarks.gpu {shlex.join(arguments)}".strip()
    name = slug(report["gpu"]["name"])
    path = options.output or RESULTS / f"{name}.json"
    report["models"] = json.loads(path.read_text())["models"] if path.exists() else {}
    deadline = time.monotonic() + options.budget
    for model in options.models:
        for backend in ("model", *options.backends):
            subject = Subject(
                model=model,
                backend=backend,
                work=options.work,
                rounds=options.rounds,
                steps=options.steps,
                images=tuple(options.images),
                repeats=options.repeats,
                parts=tuple(options.parts),
            )
            for record in _measured(subject, deadline - time.monotonic(), report["models"].setdefault(model, {})):
                report["models"][model][backend] = {**record, "commit": report["commit"]}
                write(path, report)
    print(path)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure what a GPU shows.")
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=[*MODELS, list(MODELS)])
    parser.add_argument("--backend", action="append", dest="backends", choices=[*BACKENDS, "cpu"], help="may repeat")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="what does not fit is skipped"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs that a median is taken of")
    parser.add_argument("--part", action="append", dest="parts", default=[], help="measure it alone; may repeat")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="pictures of a call; default: 1 2 4 8")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of the same picture; default: 5")
    parser.add_argument("--steps", type=int, help="of a picture, instead of the model's own")
    parser.add_argument("--work", type=Path, default=Path(".work/gpu"), help="keeps the models that are made")
    parser.add_argument("--output", type=Path, help="the file of results")
    options = parser.parse_args(arguments)
    options.backends = options.backends or list(BACKENDS)
    return options


def about(*, need_gpu: bool) -> dict[str, Any]:
    """Where the figures come from."""
    gpu = {"name": "cpu"}
    if need_gpu:
        try:
            found = load_cuda("cuda").gpu()
        except CalotypeError as error:
            sys.exit(f"nothing was measured: {error}")
        gpu = {"name": found.name, "capability": found.capability, "memory_gib": f"{found.memory / 2**30:.1f}"}
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": _quietly(commit),
        "gpu": gpu,
        "driver": _quietly(_driver) if need_gpu else None,
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _measured(subject: Subject, seconds: float, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record of one backend as it grows; nothing where ``earlier`` has one and there is no time for another."""
    made = earlier.get("model", {}).get("ready", {})
    if seconds <= 0:
        if subject.backend not in earlier:
            yield {"not_run": "the budget was spent before it began"}
    elif subject.backend != "model" and ("failed" in made or "not_run" in made):
        yield {"not_run": "there is no model to run"}
    else:
        record: dict[str, Any] = earlier.get(subject.backend, {}) if subject.parts else {}
        for part, value in run(subject, seconds):
            print(f"{subject.model} {subject.backend} {part}: {json.dumps(value)[:200]}", file=sys.stderr)
            record[part] = value
            yield record


def run(
    subject: Subject, seconds: float, work: Callable[[Subject, Callable[..., None]], None] = measure
) -> Iterator[tuple[str, Any]]:
    """Measure in a process of its own, for so many seconds at most: each part that is done, by its name."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, work, subject))
    process.start()
    theirs.close()
    deadline, begun = time.monotonic() + seconds, "start"
    try:
        while ours.poll(None if deadline == math.inf else max(0.0, deadline - time.monotonic())):
            try:
                begun, value = ours.recv()
            except EOFError:
                process.join()
                if process.exitcode != 0:
                    yield begun, {"failed": f"its process ended with {process.exitcode}"}
                return
            if value is not None:
                yield begun, value
                begun = "end"
        if begun != "end":  # what is left then is the process's own tidying up
            yield begun, {"failed": "the budget was spent before it was done"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # what it has started, too
        process.kill()
        process.join()


def _child(connection: Connection, work: Callable[[Subject, Callable[..., None]], None], subject: Subject) -> None:
    os.setpgid(0, 0)
    work(subject, lambda part, value=None: connection.send((part, value)))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _quietly(ask: Callable[[], str]) -> str | None:
    """None where there is no such program, or it fails: a copy has no history, a container perhaps no nvidia-smi."""
    try:
        return ask()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
