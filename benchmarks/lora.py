"""LoRAs switched per call, beside diffusers: ``python -m benchmarks.lora``. Switch times, step times and memory.

Both hold the same model in float32, Calotype with its engines, diffusers with ``load_lora_weights`` and
``set_adapters``, which leave the LoRA beside the weights. LoRAs of random numbers change every linear layer of the text
encoder and of the UNet's transformers, as most trainers do. They take turns in one process:

- *first*: a file that was never used, until the next step could be taken, without encoding the prompt; in seconds, and
  in those of a processor, which say more where the machine has other work;
- *again*: back to one that was used before;
- *step*: the UNet at one guided step, without a LoRA and with one.

Each of these is kept when it is measured, so that the same command goes on where it was ended. Writes
``results/lora-…``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.checkpoints import MODELS, model
from benchmarks.environments import WORK
from benchmarks.machine import machine, origin, results, write
from benchmarks.timing import figures, in_turns, ratios, spread
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.sessions.plans import has_plan

PROMPT = "a castle on a hill"
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}
LINEAR = {
    "unet": re.compile(r"\.(attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out)\.weight$"),
    "text_encoder": re.compile(r"\.(self_attn\.\w+_proj|mlp\.fc\d)\.weight$"),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd1")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    chosen = model(arguments.model, WORK / "benchmarks")
    bundle = Bundle.open(chosen.bundle)
    missing = [name for name in LINEAR if not has_plan(bundle.manifest, bundle.manifest.networks[name], "cpu")]
    if missing:
        build_engines(bundle, networks=missing, say=print)
    with tempfile.TemporaryDirectory() as folder:
        files = lora_files(chosen.bundle, Path(folder), arguments.rank)
        sides = {
            "calotype": Calotype(chosen.bundle, arguments.size),
            "diffusers": Diffusers(chosen.checkpoint, arguments.size),
        }
        settings = vars(arguments)
        report = {
            **origin(f"python -m benchmarks.lora --model {arguments.model} --rank {arguments.rank}"),
            "machine": machine(),
            **settings,
            **Measures(
                sides, files, arguments.rounds, Checkpoint(WORK / "benchmarks" / "lora.json", settings)
            ).report(),
        }
    write(results(f"lora-{arguments.model}"), report)
    print(json.dumps(report, indent=2))


def lora_files(bundle: Path, folder: Path, rank: int) -> Iterator[Path]:
    """New LoRAs without end, in float16, named as kohya's trainers name them."""
    shapes = {
        (network, name.removesuffix(".weight")): own.shape(name)
        for network, pattern in LINEAR.items()
        for own in [SafetensorsFile(bundle / f"{network}.safetensors")]
        for name in own
        if pattern.search(name)
    }
    for number in itertools.count():
        rng, state = np.random.default_rng(number), {}
        for (network, module), (rows, columns, *pixels) in shapes.items():
            parts = {"down": (rank, columns, *pixels), "up": (rows, rank, *pixels)}
            own = f"{KOHYA[network]}_{module.replace('.', '_')}"
            state[f"{own}.alpha"] = np.array(rank, np.float16)
            for part, shape in parts.items():
                values = 0.01 * rng.standard_normal(shape, np.float32)
                state[f"{own}.lora_{part}.weight"] = values.astype(np.float16)
        path = folder / f"{number}.safetensors"
        save_file(state, path)
        yield path


class Checkpoint:
    """What was measured so far with the same settings, in a file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self._found: dict[str, Any] = kept.get("found", {}) if kept.get("settings") == settings else {}

    def of(self, name: str, measure: Callable[[], Any]) -> Any:
        """A measure by its name, made where it is not there yet."""
        if name not in self._found:
            self._found[name] = measure()
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps({"settings": self._settings, "found": self._found}))
            partial.replace(self._path)
            print(f"measured: {name}", flush=True)
        return self._found[name]


class Measures:
    """All that is measured of ``sides``, in turns."""

    def __init__(self, sides: dict[str, Any], files: Iterator[Path], rounds: int, kept: Checkpoint) -> None:
        self._sides, self._files, self._rounds, self._kept = sides, files, rounds, kept
        self._used = next(files)
        self._new: list[Path] = []

    def report(self) -> dict[str, Any]:
        """The figures of each side, and of Calotype's over diffusers' in the same rounds."""
        without = self._kept.of("without", self._steps)
        for side in self._sides.values():
            side.use(self._used)
        first, again = self._kept.of("first", self._first), self._kept.of("again", self._again)
        with_one = self._kept.of("with", self._steps)
        first_s, processor = first["seconds"], first["processor"]
        each = {"first_s": first_s, "first_processor_s": processor, "again_s": again, "step_with_s": with_one}
        return {
            **{
                name: {
                    **{what: figures(seconds[name]) for what, seconds in {"step_without_s": without, **each}.items()},
                    "step_ratio": spread(ratios(with_one[name], without[name]), 3),
                }
                for name in self._sides
            },
            "over_diffusers": {
                what: spread(ratios(seconds["calotype"], seconds["diffusers"]), 4) for what, seconds in each.items()
            },
            "kept_mb": first["kept_mb"],
            "grown_mb": first["grown_mb"],
        }

    def _steps(self) -> dict[str, list[float]]:
        return in_turns({name: side.step for name, side in self._sides.items()}, self._rounds)[0]

    def _first(self) -> dict[str, Any]:
        before, processor = own_memory(), {name: list[float]() for name in self._sides}

        def first(name: str) -> None:
            begin = time.process_time()
            self._sides[name].use(self._new[-1])
            processor[name].append(time.process_time() - begin)

        calls = {name: (lambda name=name: first(name)) for name in self._sides}
        another = {name: (lambda: self._new.append(next(self._files))) for name in list(self._sides)[:1]}
        order = {name: another.get(name, lambda: None) for name in self._sides}
        seconds = in_turns(calls, self._rounds, before=order)[0]
        kept: dict[str, list[float]] = {name: own[1:] for name, own in processor.items()}  # without the warm-up
        networks = self._sides["calotype"].pipeline.networks
        return {
            "seconds": seconds,
            "processor": kept,
            "kept_mb": round(networks.kept_bytes / 1e6),
            "grown_mb": round((own_memory() - before) / 1e6),
        }

    def _again(self) -> dict[str, list[float]]:
        other = self._new[-1] if self._new else next(self._files)
        back = {name: (lambda side=side: side.use(self._used)) for name, side in self._sides.items()}
        away = {name: (lambda side=side: side.use(other)) for name, side in self._sides.items()}
        return in_turns(back, self._rounds, before=away)[0]


def own_memory() -> int:
    """Bytes of this process that are no pages of a file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


class Calotype:
    """Its pipeline; a LoRA is used by a request."""

    def __init__(self, bundle: Path, size: int) -> None:
        self.pipeline = Pipeline.load(bundle, "cpu")
        self._request = {"seed": 0, "height": size, "width": size, "num_inference_steps": 1000, "guidance_scale": 7.5}
        self._job = self.pipeline.prepare(Request(prompt=PROMPT, **self._request))

    def use(self, path: Path) -> None:
        """Merge it, and open what it changes."""
        self.pipeline.set_loras([path])
        self._job = None

    def step(self) -> None:
        """One denoising step of a guided picture."""
        if self._job is None:
            self._job = self.pipeline.prepare(Request(prompt=PROMPT, **self._request))
            self.pipeline.reserve([self._job])
        self.pipeline.step([self._job])


class Diffusers:
    """Its pipeline with PEFT; a file is loaded once, and then set."""

    def __init__(self, checkpoint: Path, size: int) -> None:
        import diffusers
        import torch

        self._torch, self._known = torch, dict[Path, str]()
        self._pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            checkpoint, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
        )
        self._inputs = (torch.zeros(2, 4, size // 8, size // 8), torch.tensor(500), torch.zeros(2, 77, 768))

    def use(self, path: Path) -> None:
        """Load it where it is new, and let it alone be active."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path not in self._known:
                self._known[path] = f"lora{len(self._known)}"
                self._pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=self._known[path])
            self._pipeline.set_adapters([self._known[path]], [1.0])

    def step(self) -> None:
        """The UNet for one guided step."""
        with self._torch.inference_mode():
            self._pipeline.unet(*self._inputs)


if __name__ == "__main__":
    main()
