"""What a step of Stable Diffusion 1.5's UNet at 256x256 takes with less attention, beside the whole one.

Cross-attention is left out, or tokens are merged (:mod:`benchmarks.shortcuts`), in graphs for ONNX Runtime on the CPU
that are made for it. The weights are random, since no time depends on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.micro.caching import SD1, SIDE
from benchmarks.micro.harness import Options, Row
from benchmarks.shortcuts import LeftOut, MergedAttention, blocks
from calotype.export.graphs import unet_plans
from calotype.export.models.layers import Attention
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.tracing import write_graph
from calotype.export.weights import write_weights
from calotype.runtime.bundle.parity import random_inputs
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.sessions import Sizes
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

TOKENS = 77
WHOLE, WITHOUT = "whole", "without cross-attention"
# What is timed, and the share of tokens that are merged in it.
FORMS = {WITHOUT: 0.0, "25% merged": 0.25, "50% merged": 0.5, "75% merged": 0.75}


def rows(options: Options) -> Iterator[Row]:
    """Each form beside the whole step: memory holds no more than two."""
    forms = {title: FORMS[title] for title in options.some(FORMS)}
    yield from steps(SD1, SIDE, forms)


def steps(config: UNetConfig, side: int, forms: Mapping[str, float]) -> Iterator[Row]:
    """The same for a UNet and latents of any size."""
    torch.manual_seed(0)
    model = UNet(config).eval()
    sizes = {"rows": 2, "tokens": TOKENS, "height": side, "width": side}
    with tempfile.TemporaryDirectory() as name:
        folder, specs = Path(name), {}
        for number, (form, merged) in enumerate({WHOLE: 0.0, **forms}.items()):
            change(model, merged, side * side, without=form == WITHOUT)
            specs[form] = write(model, sizes, folder, str(number))
        del model
        for form in forms:
            with contextlib.ExitStack() as stack:
                pair = {each: stack.enter_context(opened(folder, specs[each], sizes)) for each in (WHOLE, form)}
                calls = {each: functools.partial(session.run, sizes) for each, session in pair.items()}
                yield Row(title=f"a guided step, {form}", forms=calls)


def change(model: UNet, merged: float, tokens: int, *, without: bool) -> None:
    """Let the model's attention merge a share of the tokens, where there are so many, or leave the prompt out."""
    for block in blocks(model):
        block.attn1.__class__ = MergedAttention if merged else Attention
        block.attn1.merged, block.attn1.tokens = merged, tokens
        block.attn2.__class__ = LeftOut if without else Attention


def write(model: UNet, sizes: Sizes, folder: Path, name: str) -> ModelSpec:
    """Write the model's graph, of these sizes alone: how many tokens are merged is a number in it."""
    plan = next(plan for plan in unet_plans(model) if plan.whole is None)
    inputs, outputs = (
        tuple(dataclasses.replace(spec, shape=spec.resolve(sizes)) for spec in specs)
        for specs in (plan.inputs, plan.outputs)
    )
    plan = dataclasses.replace(plan, inputs=inputs, outputs=outputs)
    spec = dataclasses.replace(plan.spec(("float32",)), graphs={"float32": f"{name}.onnx"})
    weights = folder / spec.weights[0]
    if not weights.exists():
        write_weights(model, weights, torch.float16)
    write_graph(plan, weights, folder / spec.graphs["float32"])
    return spec


def opened(folder: Path, spec: ModelSpec, sizes: Sizes) -> OnnxRuntimeCpuSession:
    """A graph with random inputs, ready to run."""
    session = OnnxRuntimeCpuSession(folder, spec)
    session.reserve(sizes)
    for item in session.inputs:
        session.buffer(item.name, sizes)[:] = random_inputs([item], sizes, None)[item.name]
    return session
