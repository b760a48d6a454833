"""What control costs, beside diffusers: ``python -m benchmarks.control``. Times of a guided step, and memory.

Both hold the same model of random weights in float32, Calotype with its engines; a ControlNet, and a T2I-Adapter. The
sides take turns in one process: a step without control, and with the UNet that takes control: none of it, since its
share of the steps is over, one ControlNet, two (the same one twice, with two pictures), and a T2I-Adapter, whose
features are made once a picture and not in a step. Diffusers' UNet, ControlNet and adapter are called alone, without a
scheduler.

Writes ``results/control-…`` after each case; one that has been measured on this processor is kept, unless ``--again``
is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.checkpoints import Model, model
from benchmarks.environments import WORK
from benchmarks.lora import own_memory
from benchmarks.machine import machine, origin, results, write
from benchmarks.timing import figures, in_turns, ratios, spread
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.control import Control
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.sessions.plans import has_plan

PROMPT = "a castle on a hill"
# By stage, its cases; each stage has other networks open.
STAGES = {"plain": ("without",), "control": ("over", "one", "two", "adapter")}
KINDS = ("controlnet", "t2i_adapter")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control", description=__doc__)
    parser.add_argument("--model", choices=("sd1",), default="sd1")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    arguments = parser.parse_args()
    work = WORK / "benchmarks"
    chosen = model(arguments.model, work)
    controls = {kind: control(kind, work) for kind in KINDS}
    networks = {chosen.bundle: ("unet", "unet_control"), **{made.bundle: (kind,) for kind, made in controls.items()}}
    for folder, names in networks.items():
        build(folder, names)
    path = results(f"control-{arguments.model}-{arguments.size}")
    report = json.loads(path.read_text()) if path.exists() and not arguments.again else {"stages": {}}
    command = f"python -m benchmarks.control --size {arguments.size} --rounds {arguments.rounds}"
    for stage, cases in STAGES.items():
        done = report["stages"].setdefault(stage, {"cases": {}})
        missing = tuple(case for case in cases if case not in done["cases"])
        if not missing:
            continue
        for case, found in measured(chosen, controls, missing, arguments.size, arguments.rounds):
            (done["cases"] if case in cases else done)[case] = found
            report = {
                **origin(command), "machine": machine(), "model": arguments.model, "size": arguments.size,
                "rounds": arguments.rounds, "stages": report["stages"],
            }  # fmt: skip
            write(path, report)
    print(json.dumps(report, indent=2))


def control(kind: str, work: Path) -> Model:
    """A ControlNet or a T2I-Adapter of Stable Diffusion 1's width and random weights, made where it is not there."""
    checkpoint, bundle = work / kind / "checkpoint", work / kind / "bundle"
    if not checkpoint.exists():
        make = f"import pathlib, benchmarks.control as c; c.save_control({kind!r}, pathlib.Path({str(checkpoint)!r}))"
        subprocess.run([sys.executable, "-c", make], check=True)  # its memory goes with it
    if not bundle.exists():
        subprocess.run(
            [sys.executable, "-m", "calotype.runtime", "export", checkpoint, bundle, "--precision", "fp32"], check=True
        )
    return Model(name=kind, checkpoint=checkpoint, bundle=bundle, size=512)


def save_control(kind: str, folder: Path) -> None:
    """Write one in diffusers' layout, in float16."""
    import diffusers
    import torch

    torch.manual_seed(1)
    made: Any
    if kind == "controlnet":
        made = diffusers.ControlNetModel(cross_attention_dim=768)
        for zero in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(zero.weight, std=0.01)
    else:
        made = diffusers.T2IAdapter()
    partial = folder.with_suffix(".partial")
    made.to(torch.float16).save_pretrained(partial)
    partial.rename(folder)


def build(folder: Path, networks: tuple[str, ...]) -> None:
    """Build the engines of the CPU that are not there yet."""
    bundle = Bundle.open(folder)
    missing = [name for name in networks if not has_plan(bundle.manifest, bundle.manifest.networks[name], "cpu")]
    if missing:
        build_engines(bundle, networks=missing, say=print)


def measured(
    chosen: Model, controls: dict[str, Model], cases: tuple[str, ...], size: int, rounds: int
) -> Iterator[tuple[str, Any]]:
    """What both sides took to memory, under its name, and the figures of each of the ``cases``."""
    begin = own_memory()
    ours = Calotype(chosen.bundle, {kind: made.bundle for kind, made in controls.items()}, size, cases)
    opened = own_memory()
    theirs = Diffusers(chosen.checkpoint, {kind: made.checkpoint for kind, made in controls.items()}, size, cases)
    grown = {"calotype": opened - begin, "diffusers": own_memory() - opened}
    yield "own_mb", {name: round(own / 1e6) for name, own in grown.items()}
    with ours.pipeline:
        for case in cases:
            seconds = in_turns({"calotype": ours.steps(case), "diffusers": theirs.steps(case)}, rounds)[0]
            yield (
                case,
                {
                    **{name: {"step_s": figures(own)} for name, own in seconds.items()},
                    "times": spread(ratios(seconds["diffusers"], seconds["calotype"]), 3),
                    "load": machine()["load"],
                },
            )


def pictures(size: int) -> list[Image.Image]:
    """Two control pictures of random colours."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2)]


class Calotype:
    """Its pipeline, and a job for each case, which has more steps than are taken."""

    def __init__(self, bundle: Path, controls: dict[str, Path], size: int, cases: tuple[str, ...]) -> None:
        first, second = pictures(size)
        one = Control(model="controlnet", image=first)
        asked = {
            "without": (),
            "over": (Control(model="controlnet", image=first, start=0.99),),
            "one": (one,),
            "two": (one, Control(model="controlnet", image=second)),
            "adapter": (Control(model="t2i_adapter", image=first),),
        }
        used = any(asked[case] for case in cases)
        self.pipeline = Pipeline.load(bundle, "cpu", controls=controls if used else None)
        settings: dict[str, Any] = {
            "seed": 0, "height": size, "width": size, "num_inference_steps": 900, "guidance_scale": 7.5,
        }  # fmt: skip
        self._jobs = {
            case: self.pipeline.prepare(Request(prompt=PROMPT, controls=asked[case], **settings)) for case in cases
        }
        self.pipeline.reserve(list(self._jobs.values()))

    def steps(self, case: str) -> Callable[[], None]:
        """What takes one denoising step of a guided picture."""
        return lambda: self.pipeline.step([self._jobs[case]])


class Diffusers:
    """Its networks, called with the two rows of a guided picture."""

    def __init__(self, checkpoint: Path, controls: dict[str, Path], size: int, cases: tuple[str, ...]) -> None:
        import diffusers
        import torch

        self._torch = torch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._unet = diffusers.UNet2DConditionModel.from_pretrained(
                checkpoint, subfolder="unet", torch_dtype=torch.float32
            )
            if set(cases) & {"one", "two"}:
                self._net = diffusers.ControlNetModel.from_pretrained(controls["controlnet"], torch_dtype=torch.float32)
            if "adapter" in cases:
                adapter = diffusers.T2IAdapter.from_pretrained(controls["t2i_adapter"], torch_dtype=torch.float32)
                with torch.inference_mode():
                    self._features = [feature.repeat(2, 1, 1, 1) for feature in adapter(torch.rand(1, 3, size, size))]
        self._rows = torch.randn(2, 4, size // 8, size // 8), torch.tensor(500), torch.randn(2, 77, 768)
        self._pictures = [torch.rand(2, 3, size, size) for _ in range(2)]

    def steps(self, case: str) -> Callable[[], None]:
        """What evaluates the networks for one step."""
        nets = {"one": 1, "two": 2}.get(case, 0)

        def step() -> None:
            with self._torch.inference_mode():
                more: dict[str, Any] = {}
                if nets:
                    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

                    net = MultiControlNetModel([self._net] * nets)
                    down, middle = net(*self._rows, self._pictures[:nets], [1.0] * nets, return_dict=False)
                    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                if case == "adapter":
                    more["down_intrablock_additional_residuals"] = [own.clone() for own in self._features]
                self._unet(*self._rows, **more)

        return step


if __name__ == "__main__":
    main()
