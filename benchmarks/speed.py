"""Pictures by Calotype and by a peer, in turns: A B A B …, on the same weights, prompt, latents and schedule.

A machine does not hold every peer at once, so Calotype runs beside one peer at a time; a ratio is always of two that
took turns within minutes. Each pair is written as soon as it is measured, and one that was is not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import environments
from benchmarks.checkpoints import Model
from benchmarks.machine import machine, origin
from benchmarks.noise import normal
from benchmarks.peers import CALOTYPE, PEERS
from benchmarks.peers.protocol import Task
from benchmarks.timing import spread
from benchmarks.workers import PeerError, Worker
from calotype.runtime.bundle.manifest import Manifest

STEPS = 4  # where nothing else is said
PAUSE = 0.5  # seconds; threads of the one that ran before wait awake for a while, and would take time from the next
PROMPT = {"talbot": "red apple, noto style", "sd1": "a lighthouse at dusk, oil on canvas"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is drawn, and how often."""

    model: Model
    size: int
    steps: int
    images: int
    rounds: int

    @property
    def name(self) -> str:
        """A file's, without its suffix."""
        parts = ["speed", self.model.name, str(self.size)]
        parts += [f"images{self.images}"] if self.images > 1 else []
        parts += [f"steps{self.steps}"] if self.steps != STEPS else []
        return "-".join(parts)

    def command(self, program: str, peer: str) -> str:
        """What has ``program`` draw it beside ``peer``."""
        parts = ["python -m", program, "--model", self.model.name, f"--size {self.size} --steps {self.steps}"]
        parts += [f"--images {self.images}"] if self.images > 1 else []
        return " ".join([*parts, f"--rounds {self.rounds} --peers {peer}"])


def compare(plan: Plan, peer: str, work: Path) -> dict[str, Any]:
    """Figures of Calotype and ``peer`` from runs that took turns; or ``not_run`` and why."""
    report: dict[str, Any] = {**origin(plan.command("benchmarks", peer)), "machine": machine(), "rounds": plan.rounds}
    with tempfile.TemporaryDirectory() as folder:
        task = new_task(plan, Path(folder))
        try:
            with new_worker(CALOTYPE, work) as ours, new_worker(peer, work) as theirs:
                workers = {CALOTYPE: ours, peer: theirs}
                opened = {
                    name: worker.load(source(name, plan.model, work), PEERS[name].mode)
                    for name, worker in workers.items()
                }
                for worker in workers.values():  # what is prepared at the first call of a size is not timed
                    worker.generate(dataclasses.replace(task, steps=1))
                answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
                pictures: dict[str, NDArray[np.uint8]] = {}
                for _ in range(plan.rounds):
                    for name, worker in workers.items():
                        time.sleep(PAUSE)
                        answers[name].append(worker.generate(task))
                        pictures[name] = np.load(task.output)
                peaks = {name: worker.peak for name, worker in workers.items()}
        except (PeerError, subprocess.CalledProcessError) as error:
            return {**report, "not_run": str(error)}
    for name in workers:
        report["calotype" if name == CALOTYPE else "peer"] = {
            **_figures(answers[name]),
            "load_s": {key: round(opened[name][key], 2) for key in ("import", "load")},
            "peak_mb": {kind: round(count / 1e6) for kind, count in peaks[name].items()},
            "versions": opened[name]["versions"],
        }
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(answers[CALOTYPE], answers[peer], strict=True)]
    report["ratio"] = spread(ratios, 3)
    report["psnr_db"] = psnr(pictures[CALOTYPE], pictures[peer])
    return report


def source(name: str, model: Model, work: Path) -> Path:
    """The model in the form that the peer ``name`` reads, made where it is not there yet."""
    converter = PEERS[name].converter
    if PEERS[name].environment == CALOTYPE:
        if PEERS[name].mode:
            command = [sys.executable, "-m", "calotype.runtime", "build", model.bundle, "--backend", "cpu"]
            command += ["--precision", "int8"] if PEERS[name].mode in ("int8", "fast") else []
            environment = {**os.environ, "CALOTYPE_CACHE": str(work / "engines")}
            subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        return model.bundle
    if converter is None:
        return model.checkpoint
    folder = model.checkpoint.parent / converter.environment
    if not folder.exists():
        interpreter = environments.python(converter.environment, work / "peers")
        partial = folder.with_suffix(".partial")
        places = {"checkpoint": str(model.checkpoint), "folder": str(partial)}
        program, *arguments = (part.format(**places) for part in converter.command)
        subprocess.run([interpreter.parent / program, *arguments], check=True)
        partial.rename(folder)
    return folder


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float | None:
    """Decibels between pictures of 8 bits; None where they are equal."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return None if error == 0 else round(10 * float(np.log10(255**2 / error)), 1)


def measured(path: Path, peer: str) -> bool:
    """Whether the file of results at ``path`` has figures of ``peer``."""
    return path.exists() and "ratio" in json.loads(path.read_text())["pairs"].get(peer, {})


def merge(path: Path, peer: str, pair: dict[str, Any], plan: Plan) -> None:
    """Put the figures of a pair into the file of results at ``path``."""
    head = {"model": plan.model.name, "size": plan.size, "steps": plan.steps, "images": plan.images, "pairs": {}}
    report = json.loads(path.read_text()) if path.exists() else head
    report["pairs"][peer] = pair
    path.write_text(json.dumps(report, indent=2) + "\n")


def line(path: Path, peer: str) -> str:
    """The figures of ``peer`` in the file of results at ``path``, for a person."""
    pair = json.loads(path.read_text())["pairs"][peer]
    if "not_run" in pair:
        return f"{peer:<25} not run: {pair['not_run']}"
    ours, theirs, ratio = pair["calotype"], pair["peer"], pair["ratio"]
    picture = "the same picture" if pair["psnr_db"] is None else f"{pair['psnr_db']} dB"
    return (
        f"{peer:<25} {ratio['median']:.2f} times Calotype's time ({ratio['min']:.2f} to {ratio['max']:.2f}): "
        f"{theirs['picture_s']['median']:.3g} s against {ours['picture_s']['median']:.3g} s; {picture}; "
        f"{theirs['peak_mb']['resident']} MB against {ours['peak_mb']['resident']} MB"
    )


def new_worker(name: str, work: Path) -> Worker:
    """The process of the peer ``name``, started."""
    interpreter = environments.python(PEERS[name].environment, work / "peers")
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "CALOTYPE_CACHE": str(work / ("engines" if PEERS[name].mode else "no-engines")),
    }
    return Worker(interpreter, f"benchmarks.peers.{PEERS[name].module}", variables)


def new_task(plan: Plan, folder: Path) -> Task:
    """What every peer is asked to draw; its files are in ``folder``."""
    vae = Manifest.read(plan.model.bundle).vae
    shape = (vae.latent_channels, plan.size // vae.downscale, plan.size // vae.downscale)
    np.save(folder / "latents.npy", np.stack([normal(seed, shape) for seed in range(plan.images)]))
    return Task(
        prompt=PROMPT[plan.model.name],
        negative_prompt="",
        height=plan.size,
        width=plan.size,
        steps=plan.steps,
        guidance_scale=3.0,
        images=plan.images,
        seed=0,
        latents=str(folder / "latents.npy"),
        output=str(folder / "pictures.npy"),
    )


def _figures(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = [second for answer in answers for second in answer["steps"]]
    stages = answers[0]["stages"]
    return {
        "picture_s": spread([answer["seconds"] for answer in answers], 4),
        "step_s": spread(steps, 4),
        "stages_s": {name: spread([answer["stages"][name] for answer in answers], 4) for name in stages},
    }
