"""One guided evaluation of a bundle's UNet in float32 and int8, and the memory of a process that has run it.

The weights may be random. The int8 engine is calibrated on pictures of the first ``--size``. ``own_mb`` leaves out the
pages of mapped files, which ``resident_mb`` counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.micro.harness import Figures, Options, Row
from benchmarks.speed import PAUSE
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.sessions import Session, open_session

PRECISIONS = ("float32", "int8")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The bundle and the sizes."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, action="append", help="pixels of a side; may be repeated; default: 512")


def rows(options: Options) -> Iterator[Row]:
    """Both precisions at each size."""
    sizes, path = options.own.size or [512], options.own.bundle
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CALOTYPE_CACHE"] = folder
        options.about |= {"variant": path.resolve().name, **build(path, sizes[0])}
        for size in options.some(sizes):
            memory: dict[str, Figures] = {name: measured_memory(path, name, size) for name in PRECISIONS}
            with contextlib.ExitStack() as stack:
                sessions = {name: stack.enter_context(opened(path, name, size)) for name in PRECISIONS}
                forms = {name: functools.partial(one.run, sizes_of(size)) for name, one in sessions.items()}
                title = f"a guided step at {size} x {size}"
                yield Row(title=title, forms=forms, more=functools.partial(_given, memory), pause=PAUSE)


def build(path: Path, size: int) -> dict[str, float | str]:
    """Build the engines of both precisions; how long the one in int8 takes, and how far it is off."""
    bundle, said = Bundle.open(path), list[str]()
    defaults = dataclasses.replace(bundle.manifest.defaults, height=size, width=size)
    begin = time.perf_counter()
    build_engines(
        Bundle(bundle.path, dataclasses.replace(bundle.manifest, defaults=defaults)), precision="int8", say=said.append
    )
    seconds = round(time.perf_counter() - begin, 1)
    build_engines(bundle, networks=["unet"])
    return {"build_s": seconds, "off": said[-1]}


def _given(memory: dict[str, Figures], *_: Any) -> dict[str, Figures]:
    return memory


def measured_memory(path: Path, precision: str, size: int) -> dict[str, int]:
    """Megabytes of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory, (path, precision, size))


def memory(path: Path, precision: str, size: int) -> dict[str, int]:
    """Megabytes of this process, once it has run the UNet."""
    with opened(path, precision, size) as session:
        session.run(sizes_of(size))
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"own_mb": "RssAnon", "resident_mb": "VmRSS"}
    return {name: int(lines[key].split()[0]) * 1024 // 10**6 for name, key in kinds.items()}


def opened(path: Path, precision: str, size: int) -> Session:
    """The UNet with random inputs; latents have an eighth of the pixels."""
    spec = Bundle.open(path, weights=False).manifest.networks["unet"]
    session, sizes = open_session(path, spec, "cpu", precision=precision), sizes_of(size)
    session.reserve(sizes)
    rng = np.random.default_rng(0)
    for item in session.inputs:
        session.buffer(item.name, sizes)[:] = rng.standard_normal(item.resolve(sizes))
    session.buffer("timestep", sizes)[:] = 500
    return session


def sizes_of(size: int) -> dict[str, int]:
    """The sizes of a guided step for one picture of ``size`` pixels a side."""
    return {"rows": 2, "tokens": 77, "height": size // 8, "width": size // 8}
