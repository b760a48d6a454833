"""What an engine in int8 gives and costs: ``python -m benchmarks.int8 talbot``, a bundle's folder, or operators; JSON.

Of talbot's pictures (seeds from 0, the prompts of ``quality/pairs.csv``): PSNR and distance in the features of
``quality`` to the exact ones, and retrieval, with matrix products in int8, with convolutions too, at as many steps as
``--fast`` takes and at half of them, and with the float16 graphs rounded as a GPU would. ``top5_change`` is by how many
points retrieval differs from the exact pictures', with its standard error: the pairs are the sample, each the mean of
its seeds.

Of a bundle, whose weights may be random: seconds of one guided evaluation of the UNet, float32 and int8 in turn after
one run each, and memory of a process that has opened and run it. It is calibrated on pictures of the first ``--size``.

Of operators, in the shapes of SD 1.5's UNet: milliseconds of each way to compute it, in turn, and how far it strays.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks.fast import compare, rounded
from benchmarks.machine import machine, origin
from benchmarks.operators import node, opened
from benchmarks.quality.__main__ import PAIRS, judge, load_gallery, retrieved
from benchmarks.quality.features import features
from benchmarks.speed import PAUSE
from calotype.engine import int8
from calotype.engine.cpu import build_engines
from calotype.engine.graph import CONTRIB
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.pipeline import Output, Pipeline
from calotype.runtime.sessions import Form, Session, open_session
from training import data
from training.config import TALBOT

INT8 = Acceleration(precision="int8")
PRECISIONS = ("float32", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to draw: which operators of the UNet are in int8, the share of the steps, whether graphs are rounded."""

    operators: tuple[str, ...] = ()
    steps: float = 1.0
    float16: bool = False


MODES = {
    "exact": Mode(),
    "MatMul in int8": Mode(operators=("MatMul",)),
    "Conv and MatMul in int8": Mode(operators=("Conv", "MatMul")),
    **{
        f"{share:.0%} of the steps{where}": Mode(operators=operators, steps=share)
        for share in (FAST.steps, 0.5)
        for where, operators in (("", ()), (" in int8", ("Conv", "MatMul")))
    },
    "float16": Mode(float16=True),
}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--every", type=int, default=1, help="of the prompts, every so many")
    parser.add_argument("--seeds", type=int, default=3, help="pictures of a prompt")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help="beside exact")
    parser.add_argument("--size", type=int, action="append", help="pixels of a bundle's pictures; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=PRECISIONS, help="print a process's memory after a run, and stop")
    arguments = parser.parse_args()
    sizes = tuple(arguments.size or (512,))
    about = origin("", "benchmarks", "engine", "runtime")  # of the code that runs now, hours before it ends
    if arguments.memory is not None:
        print(json.dumps(memory(Path(arguments.model), arguments.memory, sizes[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CALOTYPE_CACHE"] = folder
        if arguments.model == "talbot":
            what = f"talbot --every {arguments.every} --seeds {arguments.seeds}"
            if arguments.modes != list(MODES):
                what += f" --modes {shlex.join(arguments.modes)}"
            report = talbot(arguments.every, arguments.seeds, arguments.modes)
        elif arguments.model == "operators":
            what = f"operators --rounds {arguments.rounds}"
            report = {"rounds": arguments.rounds, "operators": operators(arguments.rounds)}
        else:
            what = " ".join(["BUNDLE", *(f"--size {size}" for size in sizes), f"--rounds {arguments.rounds}"])
            report = bundle(Path(arguments.model), sizes, arguments.rounds)
    about["command"] = f"python -m benchmarks.int8 {what}"
    about["machine"] = {**machine(), "onnxruntime": onnxruntime.__version__}
    print(json.dumps(about | report, indent=2))


def talbot(every: int, seeds: int, names: Sequence[str]) -> dict[str, Any]:
    """How near pictures of these modes come."""
    if not data.data_path(TALBOT).exists():
        data.make(TALBOT)
    gallery = load_gallery(data.load(TALBOT))
    pairs = list(csv.DictReader(PAIRS.open(encoding="utf-8")))[::every]
    bundle, drawn = Bundle.open("talbot"), {}
    steps = bundle.manifest.defaults.num_inference_steps
    prompts = [f"{pair['name']}, {pair['style']} style" for pair in pairs]
    built: tuple[str, ...] = ()
    for name in dict.fromkeys(["exact", *names]):
        mode = MODES[name]
        if mode.operators and mode.operators != built:
            whole, int8.OPERATORS = int8.OPERATORS, mode.operators
            build_engines(bundle, precision="int8", force=True)
            int8.OPERATORS, built = whole, mode.operators
        with tempfile.TemporaryDirectory() as folder:
            own = rounded(Path(folder)) if mode.float16 else bundle
            drawn[name] = _draw(own, INT8 if mode.operators else EXACT, round(steps * mode.steps), prompts, seeds)
    pictures = {name: [output.images[0] for output in own] for name, own in drawn.items()}
    hits = {name: retrieved(features(own), gallery, pairs * seeds, 5) for name, own in pictures.items()}
    modes = {
        name: compare(drawn["exact"], drawn[name])
        | judge(pictures[name], gallery, pairs * seeds)
        | {"top5_change": change(hits["exact"], hits[name], pairs)}
        for name in drawn
    }
    return {"prompts": len(pairs), "seeds": seeds, "steps": steps, "modes": modes}


def change(
    exact: NDArray[np.bool_], own: NDArray[np.bool_], pairs: list[dict[str, str]]
) -> dict[str, dict[str, float]]:
    """By how many points ``own`` is retrieved more often than ``exact``, and the standard error, by split.

    Both are (seeds * pairs,), all pairs of a seed before the next one's. Seeds of a pair are not independent.
    """
    points = 100 * (own.astype(float) - exact).reshape(-1, len(pairs)).mean(axis=0)
    found = {}
    for split in ("seen", "held_out"):
        part = points[[pair["split"] == split for pair in pairs]]
        error = part.std(ddof=1) / np.sqrt(len(part))
        found[split] = {"mean": round(float(part.mean()), 2), "error": round(float(error), 2)}
    return found


def _draw(bundle: Bundle, fast: Acceleration, steps: int, prompts: list[str], seeds: int) -> list[Output]:
    with Pipeline(bundle, "cpu", fast=fast) as pipeline:
        return [pipeline(prompt, seed=seed, num_inference_steps=steps) for seed in range(seeds) for prompt in prompts]


def bundle(path: Path, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds and bytes; calibrated at the first size, memory at each."""
    opened, said = Bundle.open(path), list[str]()
    defaults = dataclasses.replace(opened.manifest.defaults, height=sizes[0], width=sizes[0])
    small = Bundle(opened.path, dataclasses.replace(opened.manifest, defaults=defaults))
    begin = time.perf_counter()
    build_engines(small, precision="int8", say=said.append)
    report: dict[str, Any] = {
        "build_s": round(time.perf_counter() - begin, 1),
        "off": said[-1],
        "rounds": rounds,
        "sizes": {},
    }
    build_engines(small, networks=["unet"])
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.int8", str(path), "--size", str(size), "--memory"]
        report["sizes"][str(size)] = {
            **_seconds(path, size, rounds),
            "memory_mb": {
                precision: json.loads(subprocess.run([*command, precision], capture_output=True, check=True).stdout)
                for precision in PRECISIONS
            },
        }
    return report


def _seconds(path: Path, size: int, rounds: int) -> dict[str, Any]:
    """Of one guided evaluation, in turn."""
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    sessions = {precision: _open(path, precision, size) for precision in PRECISIONS}
    for _ in range(rounds + 1):
        for precision, session in sessions.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            session.run(_sizes(size))
            seconds[precision].append(time.perf_counter() - start)
    for session in sessions.values():
        session.close()
    ratios = [whole / part for whole, part in zip(seconds["float32"][1:], seconds["int8"][1:], strict=True)]
    edges = {"median": statistics.median, "min": min, "max": max}
    return {
        "step_s": {precision: round(statistics.median(own[1:]), 2) for precision, own in seconds.items()},
        "ratio": {name: round(edge(ratios), 2) for name, edge in edges.items()},
    }


def operators(rounds: int) -> dict[str, Any]:
    """Of two rows at 256 x 256 pixels."""
    products = ((2048, 320, 2560), (512, 640, 640), (512, 640, 5120), (128, 1280, 10240), (128, 5120, 1280))
    convolutions = ((320, 320, 32), (960, 320, 32), (640, 640, 16), (1280, 1280, 8))
    return {
        **{f"product {' x '.join(map(str, shape))}": _timed(*_product(*shape), rounds) for shape in products},
        **{
            f"convolution {own[0]} to {own[1]} channels at {own[2]} x {own[2]}": _timed(*_convolution(*own), rounds)
            for own in convolutions
        },
    }


def _product(rows: int, width: int, out: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Sessions by name; dynamic ranges, fixed ones of either sign, and blocks of 32 weights with a scale each."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, width), np.float32), rng.standard_normal((width, out), np.float32) / 50
    q, s = int8.per_channel(w, axis=1)
    blocks = np.ascontiguousarray(w.T).reshape(out, width // 32, 32)
    scales = np.abs(blocks).max(2) / np.float32(127)
    bytes_ = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
    unit = np.float32(np.abs(x).max() / 127)
    rounded = {"q": q, "s": s, "unit": unit}
    multiplied = node("MatMulIntegerToFloat", "x8 q unit s zero", "y", domain=CONTRIB)
    fixed = [node("QuantizeLinear", "x unit zero", "x8"), multiplied]
    how = {"K": width, "N": out, "bits": 8, "block_size": 32, "accuracy_level": 4, "domain": CONTRIB}
    return {
        "float32": opened([node("MatMul", "x w", "y")], {"w": w}),
        "range of its own": opened([node("DynamicQuantizeLinear", "x", "x8 unit zero"), multiplied], {"q": q, "s": s}),
        "range given": opened(fixed, {**rounded, "zero": np.uint8(128)}),
        "range given, signed": opened(fixed, {**rounded, "zero": np.int8(0)}),
        "blocks": opened([node("MatMulNBits", "x b s", "y", **how)], {"b": bytes_, "s": scales.reshape(-1)}),
    }, x


def _convolution(channels: int, out: int, side: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Likewise; ``ConvInteger`` leaves its integers to other nodes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, side, side), np.float32)
    w = rng.standard_normal((out, channels, 3, 3), np.float32) / 50
    plain = opened([node("Conv", "x w", "y", pads=[1] * 4)], {"w": w})
    y = plain.run(["y"], {"x": x})[0]
    q, s = int8.per_channel(w, axis=0)
    given = {"q": q, "s": s, "unit": np.float32(np.abs(x).max() / 127), "out": np.float32(np.abs(y).max() / 127)}
    given["none"] = np.zeros(out, np.int8)
    fixed = [
        node("QuantizeLinear", "x unit zero", "x8"),
        node("QLinearConv", "x8 unit zero q s none out zero", "y8", pads=[1] * 4),
        node("DequantizeLinear", "y8 out zero", "y"),
    ]
    own = [
        node("DynamicQuantizeLinear", "x", "x8 unit zero"),
        node("ConvInteger", "x8 q zero", "y32", pads=[1] * 4),
        node("Cast", "y32", "whole", to=onnx.TensorProto.FLOAT),
        node("Mul", "unit s", "scale"),
        node("Mul", "whole scale", "y"),
    ]
    return {
        "float32": plain,
        "range given": opened(fixed, {**given, "zero": np.uint8(128)}),
        "range given, signed": opened(fixed, {**given, "zero": np.int8(0)}),
        "ConvInteger": opened(own, {"q": q, "s": s.reshape(1, -1, 1, 1)}),
    }, x


def _timed(sessions: dict[str, Any], x: NDArray[np.float32], rounds: int) -> dict[str, Any]:
    """Median milliseconds, and root mean square of the difference from float32 over that of float32."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    found = {}
    for _ in range(rounds + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            found[name] = session.run(["y"], {"x": x})[0]
            seconds[name].append(time.perf_counter() - start)
    exact = found["float32"]
    return {
        name: {
            "ms": round(1e3 * statistics.median(own[1:]), 1),
            "off": round(float(np.sqrt(np.square(found[name] - exact).mean() / np.square(exact).mean())), 4),
        }
        for name, own in seconds.items()
    }


def memory(path: Path, precision: str, size: int) -> dict[str, int]:
    """Megabytes of this process: its own, and with the pages of mapped files."""
    session = _open(path, precision, size)
    session.run(_sizes(size))
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[key].split()[0]) * 1024 // 10**6 for name, key in (("own", "RssAnon"), ("resident", "VmRSS"))
    }


def _open(path: Path, precision: str, size: int) -> Session:
    """With random inputs; latents have an eighth of the pixels."""
    spec = Bundle.open(path, weights=False).manifest.networks["unet"]
    session, sizes = open_session(path, spec, "cpu", form=Form.parse(precision)), _sizes(size)
    session.reserve(sizes)
    rng = np.random.default_rng(0)
    for item in session.inputs:
        session.buffer(item.name, sizes)[:] = rng.standard_normal(item.resolve(sizes))
    session.buffer("timestep", sizes)[:] = 500
    return session


def _sizes(size: int) -> dict[str, int]:
    return {"rows": 2, "tokens": 77, "height": size // 8, "width": size // 8}


if __name__ == "__main__":
    main()
