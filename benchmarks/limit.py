"""How near the machine's limit: ``python -m benchmarks.limit [talbot|sd1]``. Writes ``results/limit-…``.

Operations are counted module by module from the traced network (multiply and add count as two), and divided by the
seconds of one run of a built engine; the limit is what a product of two large float32 matrices reaches on this
machine, in NumPy's library, in turns with the runs. Attention, normalisation and memory keep a network below it; an
engine whose convolutions need fewer products than were counted can be above it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import numpy as np
import torch

from benchmarks import speed
from benchmarks.checkpoints import MODELS, SIZES, model
from benchmarks.environments import WORK
from benchmarks.machine import RESULTS, machine, origin
from benchmarks.operations import operations
from calotype.engine.cpu import build_engines
from calotype.export.graphs import GraphPlan, unet_plans, vae_plans
from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.unet import UNet
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.sessions import open_session
from training.config import TALBOT

NETWORKS = ("unet", "vae_decoder")
ORDER = 4096  # of the matrices


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limit", description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, default="talbot")
    parser.add_argument("--size", type=int, nargs="+", help="pixels of a side; default: the model's own")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    chosen = model(arguments.model, WORK / "benchmarks")
    bundle = Bundle.open(chosen.bundle)
    os.environ["CALOTYPE_CACHE"] = str(WORK / "engines")
    build_engines(bundle, networks=NETWORKS, say=print)
    report: dict[str, Any] = {**origin("python -m benchmarks.limit"), "machine": machine(), "rounds": arguments.rounds}
    for size in arguments.size or [chosen.size]:
        side = size // bundle.manifest.vae.downscale
        tokens = bundle.manifest.tokenizers["tokenizer"].max_length
        for network, sizes in (
            (NETWORKS[0], {"rows": 2, "tokens": tokens, "height": side, "width": side}),
            (NETWORKS[1], {"batch": 1, "height": side, "width": side}),
        ):
            figures = fraction(arguments.model, bundle, network, sizes, arguments.rounds)
            report[f"{network} {size}"] = figures
            print(f"{network} at {size}x{size}: {figures}", flush=True)
    (RESULTS / f"limit-{arguments.model}.json").write_text(json.dumps(report, indent=2) + "\n")


def fraction(name: str, bundle: Bundle, network: str, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Operations of one run, its share of the limit, and both rates."""
    plans = {plan.network: plan for plan in _plans(name)}
    count = operations(plans[network], sizes)
    seconds, limits = [], []
    left = np.random.default_rng(0).standard_normal((ORDER, ORDER), np.float32)
    out = np.empty_like(left)
    with open_session(bundle.path, bundle.manifest.networks[network], "cpu") as session:
        session.reserve(sizes)
        session.run(sizes)
        for _ in range(rounds):
            time.sleep(speed.PAUSE)
            begin = time.perf_counter()
            np.matmul(left, left, out=out)
            limits.append(2 * ORDER**3 / (time.perf_counter() - begin))
            begin = time.perf_counter()
            session.run(sizes)
            seconds.append(time.perf_counter() - begin)
    rates = [count / second for second in seconds]
    return {
        "giga_operations": round(count / 1e9, 1),
        "giga_per_second": speed.spread([rate / 1e9 for rate in rates], 1),
        "limit_giga_per_second": speed.spread([limit / 1e9 for limit in limits], 1),
        "fraction": speed.spread([rate / limit for rate, limit in zip(rates, limits, strict=True)], 3),
    }


def _plans(name: str) -> list[GraphPlan]:
    unet, autoencoder = TALBOT.unet, TALBOT.autoencoder
    if name in SIZES:
        unet, autoencoder = (SIZES[name][part][1] for part in ("unet", "vae"))
    with torch.device("meta"):
        return [*unet_plans(UNet(unet).eval()), *vae_plans(Autoencoder(autoencoder).eval())]


if __name__ == "__main__":
    main()
