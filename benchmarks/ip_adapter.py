"""What image prompts cost, beside diffusers: ``python -m benchmarks.ip_adapter``. Times of a guided step, and memory.

Both hold the same model of random weights in float32, Calotype with its engines, and two IP-Adapters: a plain one,
which makes 4 tokens of a picture, and Plus, which makes 16. The sides take turns in one process: a step without image
prompts, with one of them, and with both. Diffusers' UNet is called alone, without a scheduler. A picture is encoded
once, before the first step, on both sides, so the image encoder here is a small one.

Writes ``results/ip_adapter-…`` after each stage; a stage that has been measured on this processor is kept, unless
``--again`` is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
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
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.sessions.plans import has_plan

PROMPT = "a castle on a hill"
# By stage, its cases and their adapters; each stage has other networks open.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {"without": ()},
    "prompted": {"plain": ("plain",), "plus": ("plus",), "both": ("plain", "plus")},
}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 32,
}
SEED = 1


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ip_adapter", description=__doc__)
    parser.add_argument("--model", choices=("sd1",), default="sd1")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    arguments = parser.parse_args()
    work = WORK / "benchmarks"
    chosen = model(arguments.model, work)
    adapters = {kind: adapter(kind, chosen, work) for kind in ("plain", "plus")}
    build(chosen.bundle, ("unet", "unet_image_prompt"))
    path = results(f"ip_adapter-{arguments.model}-{arguments.size}")
    report = json.loads(path.read_text()) if path.exists() and not arguments.again else {"stages": {}}
    for stage, cases in STAGES.items():
        if stage not in report["stages"]:
            measured = measure(chosen, adapters, cases, arguments.size, arguments.rounds)
            command = f"python -m benchmarks.ip_adapter --size {arguments.size} --rounds {arguments.rounds}"
            stages = {**report["stages"], stage: measured}
            report = {
                **origin(command), "machine": machine(), "model": arguments.model, "size": arguments.size,
                "rounds": arguments.rounds, "stages": stages,
            }  # fmt: skip
            write(path, report)
    print(json.dumps(report, indent=2))


def adapter(kind: str, chosen: Model, work: Path) -> Model:
    """An IP-Adapter of random weights for the model's UNet, made where it is not there."""
    folder = work / f"{chosen.name}-ip-{kind}"
    file, bundle = folder / f"{kind}.safetensors", folder / "bundle"
    if not file.exists():
        arguments = f"{kind!r}, pathlib.Path({str(chosen.checkpoint)!r}), pathlib.Path({str(file)!r})"
        make = f"import pathlib, benchmarks.ip_adapter as c; c.save_adapter({arguments})"
        subprocess.run([sys.executable, "-c", make], check=True)  # its memory goes with it
    if not bundle.exists():
        subprocess.run([sys.executable, "-m", "calotype.runtime", "export", file, bundle], check=True)
    return Model(name=kind, checkpoint=file, bundle=bundle, size=chosen.size)


def save_adapter(kind: str, checkpoint: Path, file: Path) -> None:
    """Write one in float16 in the layout of the published files, and the image encoder beside it."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(SEED)
    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    encoder.to(torch.float16).save_pretrained(file.parent / "image_encoder")
    state = adapter_state(kind, layers(config), config["cross_attention_dim"], encoder.config)
    partial = file.with_suffix(".partial")
    save_file({name: tensor.to(torch.float16) for name, tensor in state.items()}, partial)
    partial.rename(file)


def layers(config: dict[str, Any]) -> list[int]:
    """Channels of a UNet's cross-attentions in the order of the files: down, up, and the middle last."""
    from calotype.export.models.unet import UNetConfig, cross_attentions

    blocks = cross_attentions(UNetConfig.from_json(config))
    ordered = sorted(blocks, key=lambda block: block[0] == "mid")
    return [channels for _, count, channels in ordered for _ in range(count)]


def adapter_state(kind: str, channels: list[int], context: int, encoder: Any) -> dict[str, Any]:
    """The tensors of a plain IP-Adapter of 4 tokens, or of Plus of 16, random ones."""
    from calotype.export.models.ip_adapter import IPAdapter, IPAdapterConfig

    plain = kind == "plain"
    config = IPAdapterConfig(
        kind=kind,
        image_dim=encoder.projection_dim if plain else encoder.hidden_size,
        cross_attention_dim=context,
        layers=tuple(channels),
        tokens=4 if plain else 16,
        width=context,
        heads=12,
        depth=4,
        hidden=4 * context,
    )
    state = IPAdapter(config).state_dict()
    if "image_proj.latents" in state:
        state["image_proj.latents"] = state["image_proj.latents"].normal_()
    numbered = {}
    for name, tensor in state.items():
        part, number, *rest = name.split(".")
        renamed = ".".join([part, str(2 * int(number) + 1), *rest]) if part == "ip_adapter" else name
        numbered[renamed] = tensor.contiguous()
    return numbered


def build(folder: Path, networks: tuple[str, ...]) -> None:
    """Build the engines of the CPU that are not there yet."""
    bundle = Bundle.open(folder)
    missing = [name for name in networks if not has_plan(bundle.manifest, bundle.manifest.networks[name], "cpu")]
    if missing:
        build_engines(bundle, networks=missing, say=print)


def measure(
    chosen: Model, adapters: dict[str, Model], cases: dict[str, tuple[str, ...]], size: int, rounds: int
) -> dict[str, Any]:
    """The figures of both sides in one stage, by case."""
    begin = own_memory()
    ours = Calotype(chosen.bundle, {kind: made.bundle for kind, made in adapters.items()}, size, cases)
    opened = own_memory()
    theirs = Diffusers(chosen.checkpoint, {kind: made.checkpoint for kind, made in adapters.items()}, size)
    grown = {"calotype": opened - begin, "diffusers": own_memory() - opened}
    found: dict[str, Any] = {}
    with ours.pipeline:
        for case, kinds in cases.items():
            theirs.use(kinds)
            seconds = in_turns({"calotype": ours.steps(case), "diffusers": theirs.step}, rounds)[0]
            found[case] = {
                **{name: {"step_s": figures(own)} for name, own in seconds.items()},
                "times": spread(ratios(seconds["diffusers"], seconds["calotype"]), 3),
            }
    return {"cases": found, "own_mb": {name: round(own / 1e6) for name, own in grown.items()}}


class Calotype:
    """Its pipeline, and a job for each case, which has more steps than are taken."""

    def __init__(self, bundle: Path, adapters: dict[str, Path], size: int, cases: dict[str, tuple[str, ...]]) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        used = any(cases.values())
        self.pipeline = Pipeline.load(bundle, "cpu", image_prompts=adapters if used else None)
        settings: dict[str, Any] = {
            "seed": 0, "height": size, "width": size, "num_inference_steps": 900, "guidance_scale": 7.5,
        }  # fmt: skip
        self._jobs = {}
        for case, kinds in cases.items():
            prompts = tuple(ImagePrompt(model=kind, images=(image,)) for kind in kinds)
            self._jobs[case] = self.pipeline.prepare(Request(prompt=PROMPT, image_prompts=prompts, **settings))
        self.pipeline.reserve(list(self._jobs.values()))

    def steps(self, case: str) -> Callable[[], None]:
        """What takes one denoising step of a guided picture."""
        return lambda: self.pipeline.step([self._jobs[case]])


class Diffusers:
    """Its UNet, called with the two rows of a guided picture."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path], size: int) -> None:
        import diffusers
        import torch

        self._torch, self._adapters = torch, adapters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._unet = diffusers.UNet2DConditionModel.from_pretrained(
                checkpoint, subfolder="unet", torch_dtype=torch.float32
            )
        text = torch.randn(2, 77, self._unet.config.cross_attention_dim)
        self._rows = torch.randn(2, 4, size // 8, size // 8), torch.tensor(500), text
        self._more: dict[str, Any] = {}

    def use(self, kinds: tuple[str, ...]) -> None:
        """Load the adapters of those kinds, and embeddings of a picture for each."""
        from safetensors.torch import load_file

        if not kinds:
            return
        states, embeddings = [], []
        for kind in kinds:
            parts: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
            for name, tensor in load_file(self._adapters[kind]).items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor.float()
            states.append(parts)
            project = parts["image_proj"]["proj.weight" if kind == "plain" else "proj_in.weight"]
            tokens = () if kind == "plain" else (50,)
            embeddings.append(self._torch.randn(2, 1, *tokens, project.shape[1]))
        self._unet._load_ip_adapter_weights(states)
        self._more = {"added_cond_kwargs": {"image_embeds": embeddings}}

    def step(self) -> Any:
        """Evaluate the UNet once."""
        with self._torch.inference_mode():
            return self._unet(*self._rows, **self._more, return_dict=False)[0]


if __name__ == "__main__":
    main()
