"""How near a network comes to the machine's limit.

Operations are counted module by module from the traced network (a multiplication with its addition counts as two), and
divided by the seconds of one run of a built engine; the limit is what a product of two large float32 matrices reaches
on this machine, in NumPy's library, in turns with the runs. Attention, normalisation and memory keep a network below
it; an engine whose convolutions need fewer products than were counted can be above it.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.checkpoints import MODELS, SIZES, model
from benchmarks.environments import WORK
from benchmarks.micro.harness import Figures, Options, Row, Seconds
from benchmarks.operations import operations, plans
from benchmarks.speed import PAUSE
from benchmarks.timing import figures
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.sessions import Session, open_session
from training.config import TALBOT

NETWORKS = ("unet", "vae_decoder")
ORDER = 4096  # of the matrices
PRODUCT, NETWORK = "matrix product", "network"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the size of its pictures."""
    parser.add_argument("model", nargs="?", choices=MODELS, default="talbot")
    parser.add_argument("--size", type=int, nargs="+", help="pixels of a side; default: the model's own")


def rows(options: Options) -> Iterator[Row]:
    """Each network at each size, beside the matrix product."""
    name = options.own.model
    options.about["variant"] = name
    chosen = model(name, WORK / "benchmarks")
    bundle = Bundle.open(chosen.bundle)
    os.environ["CALOTYPE_CACHE"] = str(WORK / "engines")
    build_engines(bundle, networks=NETWORKS, say=print)
    unet, vae = (
        (TALBOT.unet, TALBOT.autoencoder) if name not in SIZES else (SIZES[name][part][1] for part in ("unet", "vae"))
    )
    traced = {plan.network: plan for plan in plans(unet, vae)}
    for size in options.own.size or [chosen.size]:
        for network in options.some(NETWORKS):
            sizes = sizes_of(bundle, network, size)
            with open_session(bundle.path, bundle.manifest.networks[network], "cpu") as session:
                session.reserve(sizes)
                yield row(f"{network} at {size} pixels", session, sizes, operations(traced[network], sizes))


def sizes_of(bundle: Bundle, network: str, size: int) -> dict[str, int]:
    """The sizes of one run of ``network`` for a picture of ``size`` pixels a side, with guidance."""
    side = size // bundle.manifest.vae.downscale
    if network != "unet":
        return {"batch": 1, "height": side, "width": side}
    tokens = bundle.manifest.tokenizers["tokenizer"].max_length
    return {"rows": 2, "tokens": tokens, "height": side, "width": side}


def row(title: str, session: Session, sizes: Mapping[str, int], count: float) -> Row:
    """A run of the network and a matrix product; ``fraction`` is the one's rate over the other's."""
    left = np.random.default_rng(0).standard_normal((ORDER, ORDER), np.float32)
    out = np.empty_like(left)
    work = {PRODUCT: 2.0 * ORDER**3, NETWORK: count}

    def rates(_: Mapping[str, Any], seconds: Seconds) -> dict[str, Figures]:
        found = {form: [work[form] / second for second in own] for form, own in seconds.items()}
        more: dict[str, Figures] = {
            form: {
                "giga_operations": round(work[form] / 1e9, 1),
                "giga_per_second": figures([rate / 1e9 for rate in own]),
            }
            for form, own in found.items()
        }
        shares = [own / most for own, most in zip(found[NETWORK], found[PRODUCT], strict=True)]
        more[NETWORK]["fraction"] = figures(shares)
        return more

    return Row(
        title=title,
        forms={
            PRODUCT: functools.partial(np.matmul, left, left, out=out),
            NETWORK: functools.partial(session.run, sizes),
        },
        more=rates,
        pause=PAUSE,
    )
