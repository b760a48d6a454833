"""What attention could leave out, and what it costs: ``python -m benchmarks.attention_shortcuts``, JSON.

Three shortcuts that the engines do not have, tried with the UNet in PyTorch. *Kept*: after some steps cross-attention
gives what it gave last. *Gated*: so too, but the mean over the guided rows, and from there on without guidance: TGATE,
Zhang et al. 2024 (arXiv 2404.02747). *Merged*: a share of the tokens of the outermost self-attention is merged with
those that are most alike, and every one gets what its token got: ToMe, Bolya & Hoffman 2023 (arXiv 2303.17604).

Talbot draws prompts of ``quality/pairs.csv`` in every mode (seed 0): PSNR and distance to the exact picture, retrieval.
``sd1`` times the step of Stable Diffusion 1.5 at 256×256 in ONNX Runtime without cross-attention and with merged
tokens, in turns with the whole one. Random weights do: no time depends on them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fast import NEVER, ROUNDS, SD1, compare
from benchmarks.machine import machine, origin
from benchmarks.quality.__main__ import PAIRS, judge, load_gallery
from benchmarks.speed import spread
from calotype.export.graphs import unet_plans
from calotype.export.models.layers import Attention
from calotype.export.models.unet import TransformerBlock, UNet, UNetConfig
from calotype.export.tracing import write_graph
from calotype.export.weights import write_weights
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.parity import random_inputs
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.pipeline import Output, Pipeline
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions import Session, Sizes
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession
from training import data
from training.config import TALBOT

WHOLE, WITHOUT = "whole", "without cross-attention"
CELL = 2  # of 2x2 tokens one is kept as it is, whatever is merged
# What is timed, and the share of tokens that are merged in it.
FORMS = {WHOLE: 0.0, WITHOUT: 0.0, "25% merged": 0.25, "50% merged": 0.5, "75% merged": 0.75}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """From the share ``after`` of the steps on cross-attention is kept, or gated; ``merged`` is a share of tokens."""

    after: float = 1.0
    gated: bool = False
    merged: float = 0.0


MODES = {
    "exact": Mode(),
    **{f"cross-attention kept after {after:.0%}": Mode(after=after) for after in (0.2, 0.4, 0.6)},
    **{f"gated after {after:.0%}": Mode(after=after, gated=True) for after in (0.2, 0.4, 0.6)},
    **{f"{merged:.0%} of the tokens merged": Mode(merged=merged) for merged in (0.25, 0.5, 0.75)},
}


class KeptAttention(Attention):
    """Cross-attention that gives again what it gave last, once it is told to."""

    keeping = False
    kept: Tensor

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :class:`Attention`. Fewer rows than were kept (without guidance) share their mean."""
        if not self.keeping:
            self.kept = super().forward(x, context)
        return self.kept if len(self.kept) == len(x) else self.kept.mean(dim=0, keepdim=True)


class LeftOut(Attention):
    """Costs what kept cross-attention costs: a tensor that is there is added."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :class:`Attention`."""
        return x


class MergedAttention(Attention):
    """Self-attention over fewer tokens, where there are ``tokens`` of them, on a square."""

    merged = 0.0
    tokens = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :class:`Attention`."""
        count = round(self.merged * x.shape[1])
        if not count or x.shape[1] != self.tokens:
            return super().forward(x, context)
        merge = Merge(x, count)
        return merge.back(super().forward(merge.fewer(x)))


class Merge:
    """Which ``count`` tokens of ``x`` (B, N, C) are merged into which: the most alike, bipartite, by cosine.

    Of every 2×2 tokens the first is one that others may be merged into. The paper draws it by lot; fixed, a picture can
    be made again.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        total = x.shape[1]
        side = round(total**0.5)
        cells = torch.arange(total, device=x.device).reshape(side // CELL, CELL, side // CELL, CELL)
        cells = cells.transpose(1, 2).reshape(-1, CELL * CELL)
        self.into, self.others = cells[:, 0], cells[:, 1:].flatten()  # (D,), (S,)
        count = min(count, len(self.others))
        unit = torch.nn.functional.normalize(x, dim=-1)
        likeness, nearest = (unit[:, self.others] @ unit[:, self.into].transpose(1, 2)).max(dim=-1)  # (B, S)
        order = likeness.argsort(dim=-1, descending=True)
        self.gone, self.left = order[:, :count], order[:, count:]  # places among the others
        self.target = nearest.gather(1, self.gone)  # (B, count), places among those merged into
        self.total = total

    def fewer(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N - count, C): the others that are left, then the means."""
        wide = x.shape[-1]
        others, into = x[:, self.others], x[:, self.into]
        gone, left = (others.gather(1, _over(places, wide)) for places in (self.gone, self.left))
        sums = into.scatter_add(1, _over(self.target, wide), gone)
        ones = torch.ones_like(into[..., :1])
        counts = ones.scatter_add(1, self.target[..., None], torch.ones_like(gone[..., :1]))
        return torch.cat([left, sums / counts], dim=1)

    def back(self, x: Tensor) -> Tensor:
        """(B, N - count, C) to (B, N, C): a merged token gets what its mean got."""
        batch, _, wide = x.shape
        left, into = x.split([self.left.shape[1], len(self.into)], dim=1)
        others = torch.zeros(batch, len(self.others), wide, dtype=x.dtype, device=x.device)
        others = others.scatter(1, _over(self.left, wide), left)
        others = others.scatter(1, _over(self.gone, wide), into.gather(1, _over(self.target, wide)))
        order = torch.cat([self.others, self.into]).argsort()
        return torch.cat([others, into], dim=1)[:, order]


class TorchUNet:
    """Stands in for the session of talbot's UNet, computing in PyTorch with shortcuts."""

    def __init__(self, session: Session, model: UNet) -> None:
        self._session, self._model = session, model
        self._step, self._last = 0, 0.0
        self.mode, self.steps = Mode(), 1
        side = TALBOT.image_size // TALBOT.autoencoder.downscale
        for block in blocks(model):
            block.attn1.__class__, block.attn2.__class__ = MergedAttention, KeptAttention
            block.attn1.tokens = side * side

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    @torch.inference_mode()
    def run(self, sizes: Sizes) -> None:
        """Compute the prediction from the session's own buffers into its own."""
        sample, timestep, context = (
            torch.from_numpy(self._session.buffer(name, sizes))
            for name in ("sample", "timestep", "encoder_hidden_states")
        )
        now = float(timestep[0])
        self._step = 0 if now >= self._last else self._step + 1  # timesteps fall while one picture is made
        self._last = now
        keeping = self._step >= first(self.mode, self.steps)
        for block in blocks(self._model):
            block.attn1.merged, block.attn2.keeping = self.mode.merged, keeping
        self._session.buffer("noise_pred", sizes)[:] = self._model(sample, timestep, context).numpy()


def first(mode: Mode, steps: int) -> int:
    """The first step that keeps cross-attention."""
    return max(1, round(mode.after * steps))


def load() -> UNet:
    """Talbot's."""
    model = UNet(TALBOT.unet)
    model.load_state_dict(load_file(Bundle.open("talbot").path / "unet.safetensors"))
    return model.float().eval()


def blocks(model: UNet) -> Iterator[Any]:
    """Every transformer block."""
    return (module for module in model.modules() if isinstance(module, TransformerBlock))


def _over(places: Tensor, wide: int) -> Tensor:
    return places[..., None].expand(-1, -1, wide)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_shortcuts", description=__doc__)
    parser.add_argument("model", nargs="?", default="talbot", choices=("talbot", "sd1"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="of the prompts, every so many")
    options = parser.parse_args(given)
    about = {
        **origin(f"python -m benchmarks.attention_shortcuts {shlex.join(given)}".strip()),
        "machine": machine() | {"torch": torch.__version__},
    }
    report = sd1() if options.model == "sd1" else talbot(options.steps, options.every)
    print(json.dumps(about | report, indent=2))


def talbot(steps: int, every: int) -> dict[str, Any]:
    """The figures of every mode, and of the same UNet in ONNX Runtime, which the others are compared with."""
    if not data.data_path(TALBOT).exists():
        data.make(TALBOT)
    gallery = load_gallery(data.load(TALBOT))
    pairs = list(csv.DictReader(PAIRS.open(encoding="utf-8")))[::every]
    drawn: dict[str, list[Output]] = {name: [] for name in ("engine", *MODES)}
    with Pipeline.load("talbot", "cpu") as pipeline:
        stand_in, engine = TorchUNet(pipeline._sessions["unet"], load()), pipeline._sessions["unet"]
        stand_in.steps = steps
        solver = create_solver(pipeline.manifest.defaults.scheduler, pipeline.manifest.scheduler, steps)
        for pair in pairs:
            prompt = f"{pair['name']}, {pair['style']} style"
            pipeline._sessions["unet"] = engine
            drawn["engine"].append(pipeline(prompt, seed=0, num_inference_steps=steps))
            pipeline._sessions["unet"] = stand_in
            for name, mode in MODES.items():
                stand_in.mode = mode
                # Guidance is on above a noise level: that of the first step without.
                low = solver.noise_level(first(mode, steps)) if mode.gated else None
                fast = Acceleration(guidance_interval=None if low is None else (low, NEVER))
                drawn[name].append(pipeline(prompt, seed=0, num_inference_steps=steps, fast=fast))
    return {
        "prompts": len(pairs),
        "steps": steps,
        "modes": {
            name: compare(drawn["engine"], outputs) | judge([output.images[0] for output in outputs], gallery, pairs)
            for name, outputs in drawn.items()
        },
    }


def sd1(
    config: UNetConfig = SD1, side: int = 32, rounds: int = ROUNDS, forms: Mapping[str, float] = FORMS
) -> dict[str, Any]:
    """Seconds of a guided step in every form over those of the whole one: the median of the rounds, and the spread."""
    torch.manual_seed(0)
    model = UNet(config).eval()
    sizes = {"rows": 2, "tokens": 77, "height": side, "width": side}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        specs = {}
        for number, (form, merged) in enumerate(forms.items()):
            for block in blocks(model):
                block.attn1.__class__ = MergedAttention if merged else Attention
                block.attn1.merged, block.attn1.tokens = merged, side * side
                block.attn2.__class__ = LeftOut if form == WITHOUT else Attention
            specs[form] = write(model, sizes, folder, str(number))
        del model
        whole: list[float] = []
        ratios = {}
        for form in list(specs)[1:]:
            seconds = in_turns(folder, [specs[WHOLE], specs[form]], sizes, rounds)
            whole += [first for first, _ in seconds]
            ratios[form] = spread([own / first for first, own in seconds], 3)
    return {"seconds_of_a_whole_step": round(statistics.median(whole), 2), "ratio": ratios}


def write(model: UNet, sizes: Sizes, folder: Path, name: str) -> ModelSpec:
    """Write its graph, of these sizes alone: how many tokens are merged is a number in it."""
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


def in_turns(folder: Path, specs: Sequence[ModelSpec], sizes: Sizes, rounds: int) -> list[list[float]]:
    """Seconds of a run of each graph, by round, after one that is not counted."""
    sessions = [OnnxRuntimeCpuSession(folder, spec) for spec in specs]
    seconds: list[list[float]] = []
    for session in sessions:
        session.reserve(sizes)
        for spec in session.inputs:
            session.buffer(spec.name, sizes)[:] = random_inputs([spec], sizes, None)[spec.name]
    for _ in range(rounds + 1):
        seconds.append([])
        for session in sessions:
            start = time.perf_counter()
            session.run(sizes)
            seconds[-1].append(time.perf_counter() - start)
    for session in sessions:
        session.close()
    return seconds[1:]


if __name__ == "__main__":
    main()
