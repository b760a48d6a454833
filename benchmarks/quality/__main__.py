"""How good is talbot? ``python -m benchmarks.quality`` prints the figures as JSON.

It draws every pair of ``pairs.csv`` once (seed 0, the prompt ``<name>, <style> style``) and asks, in the fixed space of
``features.py``, whether the real picture is among the five nearest of all real pictures of that style. The ceiling is
the same questions asked of real pictures that were shifted by a pixel and reduced; for the classifier of styles it is
how often it is right on real pictures of concepts that it was not fitted on. With ``--ask`` pairs are asked for
otherwise than by name: see ``prompts.py``. Renders the data if they are not there.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import json
import sys
from typing import Any

import numpy as np

from benchmarks.machine import machine, origin
from benchmarks.quality.colours import ColourJudge
from benchmarks.quality.prompts import ASK, by_name
from benchmarks.quality.retrieval import PAIRS, ceiling, judge, load_gallery, read_pairs
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session
from training import data
from training.captions import held_out
from training.config import CPU, GPU

SEEN_PAIRS = 140


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default="talbot", help="a bundle; default: talbot")
    parser.add_argument("--scale", type=float, action="append", help="guidance scales; default: 1 and the model's own")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the pairs, every N-th; default: all")
    parser.add_argument("--ask", choices=ASK, help="at the model's own scale, so")
    parser.add_argument("--write-pairs", action="store_true", help="choose the pairs anew, by the rule, and stop")
    arguments = parser.parse_args()
    with Pipeline.load(arguments.model) as pipeline:
        defaults = pipeline.manifest.defaults
        config = GPU if defaults.height == GPU.image_size else CPU
        if not data.data_path(config).exists():
            data.make(config)
        dataset = data.load(config)
        if arguments.write_pairs:
            write_pairs(dataset)
            return
        gallery = load_gallery(dataset)
        pairs = read_pairs(arguments.every)
        ask = ASK[arguments.ask](dataset, pairs) if arguments.ask else by_name(pairs)
        pairs = ask.pairs
        scales = arguments.scale or [1.0, defaults.guidance_scale]
        steps = arguments.steps or defaults.num_inference_steps
        report: dict[str, Any] = {
            **origin(" ".join(["python -m benchmarks.quality", *sys.argv[1:]])),
            "machine": machine(),
            "model": pipeline.manifest.name,
            "steps": steps,
            "pairs": dict(collections.Counter(pair["split"] for pair in pairs)),
            "ceiling": ceiling(gallery, pairs),
            "autoencoder_psnr_db": autoencoder_psnr(Bundle.open(arguments.model), dataset),
        }
        if ask.colours:
            judge_colour = ColourJudge(dataset)
            report["ceiling"]["colour"] = judge_colour.ceiling(pairs, ask.colours["in another colour"])
        for title, prompts in ask.prompts.items():
            for scale in [defaults.guidance_scale] if arguments.ask else scales:
                draw = functools.partial(pipeline, seed=0, guidance_scale=scale, num_inference_steps=steps)
                drawn = [draw(prompt).images[0] for prompt in prompts]
                report[title if arguments.ask else f"guidance {scale:g}"] = judge(drawn, gallery, pairs)
                if ask.colours:
                    report[title] |= judge_colour(drawn, pairs, ask.colours[title])
    print(json.dumps(report, indent=2))


def autoencoder_psnr(bundle: Bundle, dataset: data.Dataset) -> float:
    """Mean PSNR in dB of decode(encode(.)), rounded to 8 bits, on all held-out pictures."""
    networks = bundle.manifest.networks
    encoder, decoder = (open_session(bundle.path, networks[name], "cpu") for name in ("vae_encoder", "vae_decoder"))
    _, unseen = dataset.split()
    side = dataset.pictures.shape[1] // bundle.manifest.vae.downscale
    sizes = {"batch": 1, "height": side, "width": side}
    encoder.reserve(sizes)
    decoder.reserve(sizes)
    values = []
    for picture in dataset.pictures[unseen]:
        encoder.buffer("image", sizes)[0] = picture.transpose(2, 0, 1) / 127.5 - 1
        encoder.run(sizes)
        decoder.buffer("latents", sizes)[:] = encoder.buffer("mean", sizes)
        decoder.run(sizes)
        pixels = np.clip(decoder.buffer("image", sizes)[0].transpose(1, 2, 0) * 127.5 + 127.5, 0, 255).round()
        values.append(10 * np.log10(255**2 / np.square(pixels - picture).mean()))
    return round(float(np.mean(values)), 2)


def write_pairs(dataset: data.Dataset) -> None:
    """Every held-out pair, and as many seen ones as ``SEEN_PAIRS``, evenly spread over the data in its order."""
    seen, unseen = dataset.split()
    chosen = sorted([*seen[:: max(1, len(seen) // SEEN_PAIRS)][:SEEN_PAIRS], *unseen])
    with PAIRS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("slug", "name", "style", "split"))
        for n in chosen:
            concept, style = dataset.concepts[n], dataset.styles[n]
            split = "held_out" if held_out(concept.slug, style) else "seen"
            writer.writerow((concept.slug, concept.name, style, split))


if __name__ == "__main__":
    main()
