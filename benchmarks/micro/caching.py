"""What a step of Stable Diffusion 1.5's UNet at 256x256 costs, whole and shallow (DeepCache), guided and not.

The weights are random, since no time depends on them. Beside it is counted what else could be left out of a step.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.micro.harness import Figures, Options, Row, Seconds
from benchmarks.operations import counted, plans
from calotype.export.graphs import unet_plans
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.tracing import write_graph, write_part
from calotype.export.weights import write_weights
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

SD1 = UNetConfig(cross_attention_dim=768)
SIDE = 32  # of latents, for 256 pixels
STEPS = 50  # of the picture whose time is estimated
# By title, the network and its rows.
FORMS = {
    "whole, guided": ("unet_deep", 2),
    "whole": ("unet_deep", 1),
    "shallow, guided": ("unet_shallow", 2),
    "shallow": ("unet_shallow", 1),
}


def rows(options: Options) -> Iterator[Row]:
    """One row, whose forms are the kinds of step."""
    options.about["operations"] = {f"{8 * side} pixels": shares(side) for side in (SIDE, 2 * SIDE)}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        sessions = {network: stack.enter_context(one) for network, one in _sessions(Path(name)).items()}
        forms = {}
        for title in options.some(FORMS):
            network, count = FORMS[title]
            sizes = {"rows": count, "tokens": 77, "height": SIDE, "width": SIDE}
            sessions[network].reserve(sizes)
            forms[title] = functools.partial(sessions[network].run, sizes)
        yield Row(title="a step of SD 1.5's UNet at 256 pixels", forms=forms, more=_of_a_picture)


def _sessions(folder: Path) -> dict[str, OnnxRuntimeCpuSession]:
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
    return sessions


def _of_a_picture(_: Mapping[str, Any], seconds: Seconds) -> dict[str, Figures]:
    """How many times faster a guided picture is whose deep features are kept for so many steps."""
    whole, shallow = "whole, guided", "shallow, guided"
    if whole not in seconds or shallow not in seconds:
        return {}
    share = statistics.median(seconds[shallow]) / statistics.median(seconds[whole])
    evaluations = {n: -(-STEPS // n) / STEPS for n in (2, 3, 5)}
    speedup = {str(n): round(1 / (own + (1 - own) * share), 2) for n, own in evaluations.items()}
    return {shallow: {f"speedup_of_{STEPS}_steps_by_interval": speedup}}


def shares(side: int) -> dict[str, float]:
    """What else could be left out of a step of Stable Diffusion 1.5, as shares of its operations.

    Keys and values of the text do not change between steps; cross-attention is what TGATE (arXiv 2404.02747) leaves
    out late; self-attention at the outermost level is what token merging (arXiv 2303.17604) shortens.
    """
    sizes = {"rows": 1, "tokens": 77, "height": side, "width": side}
    counts = {plan.network: counted(plan, sizes) for plan in plans(SD1)}
    total = counts["unet_deep"].get_total_flops()
    modules = {name: sum(flops.values()) for name, flops in counts["unet_deep"].get_flop_counts().items()}

    def share(*endings: str, within: str = "") -> float:
        return round(sum(f for name, f in modules.items() if name.endswith(endings) and within in name) / total, 4)

    return {
        "whole_giga": round(total / 1e9, 1),
        "shallow": round(counts["unet_shallow"].get_total_flops() / total, 4),
        "text_keys_and_values": share("attn2.to_k", "attn2.to_v"),
        "cross_attention": share("attn2"),
        "self_attention": share("attn1"),
        "outermost_self_attention": share("attn1", within="down_blocks.0.") + share("attn1", within="up_blocks.3."),
    }
