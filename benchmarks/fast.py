"""What accelerations cost and give: ``python -m benchmarks.fast``, JSON; ``sd1`` for the time of a real size's steps.

Talbot draws the prompts of ``quality/pairs.csv``, each in every mode before the next (seed 0). Of a mode's pictures:
PSNR and distance in the features of ``quality`` to the exact ones, retrieval, and how many times less it took, in
operations of the UNet and in seconds of the denoising loop (the median of the ratios within a prompt). ``float16`` is
the graphs rounded as a GPU would; its time says nothing.

``sd1`` makes the UNet of Stable Diffusion 1.5 with random weights, whose pictures would say nothing, and times its
whole and shallow evaluation at 256×256 in turn; and it counts what else could be saved.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.machine import origin
from benchmarks.operations import counted, operations
from benchmarks.quality.__main__ import PAIRS, judge, load_gallery
from benchmarks.quality.features import features
from calotype.export.graphs import GraphPlan, unet_plans
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.precision import write_rounded
from calotype.export.tracing import write_graph, write_part
from calotype.export.weights import write_weights
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import MANIFEST_NAME, FileRecord
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.denoising.denoiser import INT8
from calotype.runtime.pipeline import Output, Pipeline
from calotype.runtime.sessions import Session, Sizes
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession
from training import data
from training.config import TALBOT

NEVER = 1e9
SD1 = UNetConfig(cross_attention_dim=768)
ROUNDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to draw; ``share`` is that of the steps."""

    acceleration: Acceleration = EXACT
    share: float = 1.0


MODES = {
    "exact": Mode(),
    **{f"cache {n}": Mode(acceleration=Acceleration(cache_interval=n)) for n in (2, 3, 5)},
    **{
        f"guidance {low:g} to {high:g}": Mode(acceleration=Acceleration(guidance_interval=(low, high)))
        for low, high in ((0, 20), (0, 10), (0, 5), (0.3, NEVER), (1, NEVER))
    },
    **{f"{share:.0%} of the steps": Mode(share=share) for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)},
    "cache 2, guidance 0 to 20": Mode(acceleration=Acceleration(cache_interval=2, guidance_interval=(0, 20))),
    **{
        f"{share:.0%} of the steps, guidance 0 to {high}": Mode(
            acceleration=Acceleration(guidance_interval=(0, high)), share=share
        )
        for share in (0.4, 0.5, 0.6)
        for high in (20, 10)
    },
    "60% of the steps, cache 2": Mode(acceleration=Acceleration(cache_interval=2), share=0.6),
    "cache 3, guidance 0 to 10": Mode(acceleration=Acceleration(cache_interval=3, guidance_interval=(0, 10))),
    "fast": Mode(acceleration=FAST, share=FAST.steps),
}


class Counted:
    """A session that counts the operations of its runs; ``operations`` are those of a row."""

    total = 0.0

    def __init__(self, session: Session, operations: float) -> None:
        self._session, self._operations = session, operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, sizes: Sizes) -> None:
        """Run, count."""
        self._session.run(sizes)
        Counted.total += sizes["rows"] * self._operations


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast", description=__doc__)
    parser.add_argument("model", nargs="?", default="talbot", choices=("talbot", "sd1"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="of the prompts, every so many")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help="beside exact")
    options = parser.parse_args(given)
    chosen = {name: MODES[name] for name in dict.fromkeys(["exact", *options.modes])}
    report = sd1() if options.model == "sd1" else talbot(options.steps, options.every, chosen)
    about = {
        **origin(f"python -m benchmarks.fast {shlex.join(given)}".strip()),
        "machine": {
            "processor": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
        },
    }
    print(json.dumps(about | report, indent=2))


def talbot(steps: int, every: int, modes: Mapping[str, Mode]) -> dict[str, Any]:
    """The figures of ``modes``, and of the float16 graphs."""
    if not data.data_path(TALBOT).exists():
        data.make(TALBOT)
    gallery = load_gallery(data.load(TALBOT))
    pairs = list(csv.DictReader(PAIRS.open(encoding="utf-8")))[::every]
    drawn: dict[str, list[Output]] = {name: [] for name in [*modes, "float16"]}
    operations: dict[str, list[float]] = {name: [] for name in modes}
    with tempfile.TemporaryDirectory() as folder, Pipeline.load("talbot", "cpu") as pipeline:
        count_operations(pipeline, [mode.acceleration for mode in modes.values()])
        with Pipeline(rounded(Path(folder)), "cpu") as half:
            for pair in pairs:
                prompt = f"{pair['name']}, {pair['style']} style"
                for name, mode in modes.items():
                    before = Counted.total
                    count = max(1, round(steps * mode.share))
                    drawn[name].append(pipeline(prompt, seed=0, num_inference_steps=count, fast=mode.acceleration))
                    operations[name].append(Counted.total - before)
                drawn["float16"].append(half(prompt, seed=0, num_inference_steps=steps))
    report: dict[str, Any] = {"prompts": len(pairs), "steps": steps, "modes": {}}
    for name, outputs in drawn.items():
        figures = report["modes"][name] = compare(drawn["exact"], outputs)
        if name in modes:
            figures["operations"] = round(sum(operations["exact"]) / sum(operations[name]), 2)
            figures["time"] = round(
                statistics.median(
                    exact.timings["denoising"] / own.timings["denoising"]
                    for exact, own in zip(drawn["exact"], outputs, strict=True)
                ),
                2,
            )
        figures |= judge([output.images[0] for output in outputs], gallery, pairs)
    return report


def count_operations(pipeline: Pipeline, accelerations: Iterable[Acceleration]) -> None:
    """Let every network of talbot's UNet that these take count; the one in int8 makes what the whole one does."""
    for acceleration in accelerations:
        pipeline("a", fast=acceleration, num_inference_steps=2)  # opens them
    counts = unet_operations(TALBOT.unet, 16, 32)
    for name, count in {**counts, INT8: counts["unet"]}.items():
        if name in pipeline._sessions:
            pipeline._sessions[name] = Counted(pipeline._sessions[name], count)


def compare(exact: list[Output], outputs: list[Output]) -> dict[str, Any]:
    """How far pictures are from the exact ones: PSNR in dB, its median and a tenth of all; distance of features."""
    pictures = [[output.images[0] for output in side] for side in (exact, outputs)]
    pixels = [np.stack([np.asarray(picture, np.float64) for picture in side]) for side in pictures]
    errors = np.square(pixels[0] - pixels[1]).mean(axis=(1, 2, 3))
    if not errors.any():
        return {"psnr_db": None, "psnr_tenth_db": None, "distance": 0.0}
    psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-6))
    distance = np.linalg.norm(features(pictures[0]) - features(pictures[1]), axis=1)
    return {
        "psnr_db": round(float(np.median(psnr)), 1),
        "psnr_tenth_db": round(float(np.quantile(psnr, 0.1)), 1),
        "distance": round(float(distance.mean()), 4),
    }


def rounded(folder: Path) -> Bundle:
    """Talbot in ``folder``, each network computing what its float16 graph does."""
    bundle = Bundle.open("talbot")
    networks = {}
    shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    for name, spec in bundle.manifest.networks.items():
        islands = bundle.manifest.parity[name]["float16"]["float32_islands"]
        write_rounded(folder / spec.graphs["float32"], islands, folder / f"{name}.rounded.onnx")
        networks[name] = dataclasses.replace(spec, graphs={"float32": f"{name}.rounded.onnx"})
    files = {path.name: FileRecord.of(path) for path in folder.glob("*.rounded.onnx")}
    manifest = dataclasses.replace(bundle.manifest, networks=networks, files={**bundle.manifest.files, **files})
    (folder / MANIFEST_NAME).write_text(manifest.dumps(), encoding="utf-8")
    return Bundle(folder, manifest)


def unet_operations(config: UNetConfig, side: int, tokens: int) -> dict[str, float]:
    """Operations of one row, by network; latents are ``side`` wide and high."""
    return {
        plan.network: operations(plan, {"rows": 1, "tokens": tokens, "height": side, "width": side})
        for plan in _plans(config)
    }


def sd1() -> dict[str, Any]:
    """Seconds of steps in turn, and shares of the operations."""
    report: dict[str, Any] = {"operations": {f"{8 * side} pixels": shares(side) for side in (32, 64)}}
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sessions = {}
        for plan in unet_plans(UNet(SD1).eval()):
            spec = plan.spec(("float32",))
            if plan.whole is None:
                write_weights(plan.module.get_submodule("model"), folder / spec.weights[0], torch.float16)
                write_graph(plan, folder / spec.weights[0], folder / spec.graphs["float32"])
                plan.module.to("meta")
            elif plan.network == "unet_shallow":
                write_part(folder / f"{plan.whole}.fp32.onnx", plan, folder / spec.graphs["float32"])
            else:
                continue  # computes what unet_deep does
            sessions[plan.network] = OnnxRuntimeCpuSession(folder, spec)
        for _ in range(ROUNDS + 1):
            for network, session in sessions.items():
                for rows in (2, 1):
                    sizes = {"rows": rows, "tokens": 77, "height": 32, "width": 32}
                    if not seconds.get(f"{network} {rows}"):
                        session.reserve(sizes)
                    start = time.perf_counter()
                    session.run(sizes)
                    seconds.setdefault(f"{network} {rows}", []).append(time.perf_counter() - start)
    times = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    whole = times["unet_deep 2"]
    report["step_of_a_whole_guided_one"] = {
        key: {
            "median": round(value / whole, 3),
            "spread": [round(edge(seconds[key][1:]) / whole, 3) for edge in (min, max)],
        }
        for key, value in times.items()
    }
    report["seconds_of_a_whole_guided_step"] = round(whole, 2)
    report["speedup_of_50_steps"] = {
        f"cache {n}": round(1 / (-(-50 // n) / 50 + (1 - -(-50 // n) / 50) * times["unet_shallow 2"] / whole), 2)
        for n in (2, 3, 5)
    }
    return report


def shares(side: int) -> dict[str, float]:
    """What else could be left out of a step of Stable Diffusion 1.5, as shares of its operations.

    Keys and values of the text do not change between steps; cross-attention is what TGATE (arXiv 2404.02747) leaves
    out late; self-attention at the outermost level is what token merging (arXiv 2303.17604) shortens.
    """
    sizes = {"rows": 1, "tokens": 77, "height": side, "width": side}
    plans = {plan.network: counted(plan, sizes) for plan in _plans(SD1)}
    total = plans["unet_deep"].get_total_flops()
    modules = {name: sum(flops.values()) for name, flops in plans["unet_deep"].get_flop_counts().items()}

    def share(*endings: str, within: str = "") -> float:
        return round(sum(f for name, f in modules.items() if name.endswith(endings) and within in name) / total, 4)

    return {
        "whole_giga": round(total / 1e9, 1),
        "shallow": round(plans["unet_shallow"].get_total_flops() / total, 4),
        "text_keys_and_values": share("attn2.to_k", "attn2.to_v"),
        "cross_attention": share("attn2"),
        "self_attention": share("attn1"),
        "outermost_self_attention": share("attn1", within="down_blocks.0.") + share("attn1", within="up_blocks.3."),
    }


def _plans(config: UNetConfig) -> list[GraphPlan]:
    with torch.device("meta"):
        return unet_plans(UNet(config).eval())


if __name__ == "__main__":
    main()
