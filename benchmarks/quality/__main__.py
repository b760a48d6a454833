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
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from benchmarks.machine import machine, origin
from benchmarks.quality.colours import ColourJudge
from benchmarks.quality.features import Array, LinearClassifier, features, top
from benchmarks.quality.prompts import ASK, by_name
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session
from training import data
from training.captions import held_out
from training.config import CPU, GPU, STYLES

PAIRS = Path(__file__).with_name("pairs.csv")
SEEN_PAIRS = 140


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """All real pictures: their features, concept slugs and styles (an index into ``STYLES``)."""

    pictures: list[Image.Image]
    features: Array
    moved: Array
    slugs: list[str]
    styles: np.ndarray

    @functools.cached_property
    def classify(self) -> LinearClassifier:
        """Of styles, fitted on all."""
        return style_classifier(self, np.ones(len(self.slugs), bool))


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default="talbot", help="a bundle")
    parser.add_argument("--scale", type=float, action="append", help="guidance scales; default: 1 and the model's own")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
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
        pairs = list(csv.DictReader(PAIRS.open(encoding="utf-8")))
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


def load_gallery(dataset: data.Dataset) -> Gallery:
    """Every real picture."""
    pictures = [Image.fromarray(picture) for picture in dataset.pictures]
    return Gallery(
        pictures=pictures,
        features=features(pictures),
        moved=features([move(picture) for picture in pictures]),
        slugs=[concept.slug for concept in dataset.concepts],
        styles=np.array([STYLES.index(style) for style in dataset.styles]),
    )


def judge(drawn: list[Image.Image], gallery: Gallery, pairs: Sequence[dict[str, str]]) -> dict[str, float]:
    """In per cent, by split.

    Retrieval: top 1 and top 5, among the real pictures of the pair's style. Style, in two ways: by the classifier, and
    by whether the nearest of the concept's own three real pictures is the one in the pair's style.
    """
    return _judge(features(drawn), gallery.classify, gallery, pairs)


def style_classifier(gallery: Gallery, fitted: np.ndarray) -> LinearClassifier:
    """A classifier of styles fitted on the pictures under the mask, as they are and moved."""
    samples = np.concatenate([gallery.features[fitted], gallery.moved[fitted]])
    return LinearClassifier(samples, np.tile(gallery.styles[fitted], 2))


def _judge(
    queries: Array, classify: Callable[[Array], NDArray[np.int64]], gallery: Gallery, pairs: Sequence[dict[str, str]]
) -> dict[str, float]:
    wanted = np.array([STYLES.index(pair["style"]) for pair in pairs])
    right = classify(queries) == wanted
    found = {count: retrieved(queries, gallery, pairs, count) for count in (1, 5)}
    nearest = nearest_style(queries, gallery, pairs) == wanted
    unseen = np.array([pair["split"] == "held_out" for pair in pairs])
    report = {}
    for split, mask in (("seen", ~unseen), ("held_out", unseen)):
        report |= {f"{split}_top{count}": _percent(hits[mask]) for count, hits in found.items()}
        report[f"{split}_style"] = _percent(right[mask])
        report[f"{split}_nearest_style"] = _percent(nearest[mask])
    return report


def retrieved(queries: Array, gallery: Gallery, pairs: Sequence[dict[str, str]], count: int) -> NDArray[np.bool_]:
    """(Q,): whether a pair's real picture is among the ``count`` nearest of its style."""
    wanted = np.array([STYLES.index(pair["style"]) for pair in pairs])
    hits = np.zeros(len(pairs), bool)
    for style in range(len(STYLES)):
        shelf = np.flatnonzero(gallery.styles == style)
        place = {gallery.slugs[index]: position for position, index in enumerate(shelf)}
        asked = np.flatnonzero(wanted == style)
        if len(asked):
            truth = np.array([place[pairs[index]["slug"]] for index in asked])
            hits[asked] = top(queries[asked], gallery.features[shelf], truth, count)
    return hits


def nearest_style(queries: Array, gallery: Gallery, pairs: Sequence[dict[str, str]]) -> NDArray[np.int64]:
    """(Q,): the style of the nearest real picture of the pair's own concept."""
    own = collections.defaultdict(list)
    for index, slug in enumerate(gallery.slugs):
        own[slug].append(index)
    found = []
    for query, pair in zip(queries, pairs, strict=True):
        rows = own[pair["slug"]]
        found.append(gallery.styles[rows[np.square(gallery.features[rows] - query).sum(axis=1).argmin()]])
    return np.array(found)


def move(picture: Image.Image) -> Image.Image:
    """The picture reduced to nine tenths on white and shifted by (1, -1) pixels."""
    small = picture.resize((picture.width * 9 // 10,) * 2, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(small, ((picture.width - small.width) // 2,) * 2)
    return ImageChops.offset(canvas, 1, -1)


def ceiling(gallery: Gallery, pairs: Sequence[dict[str, str]]) -> dict[str, float]:
    """What real pictures reach: moved ones in retrieval, those of concepts that were not fitted in style."""
    names = list(zip(gallery.slugs, gallery.styles, strict=True))
    where = {(slug, STYLES[style]): index for index, (slug, style) in enumerate(names)}
    queries = gallery.moved[[where[pair["slug"], pair["style"]] for pair in pairs]]
    report = _judge(queries, lambda samples: np.zeros(len(samples), np.int64), gallery, pairs)
    right = []
    fold = np.array([sum(slug.encode()) % 5 for slug in gallery.slugs])
    for part in range(5):
        classify = style_classifier(gallery, fold != part)
        right.append(classify(gallery.features[fold == part]) == gallery.styles[fold == part])
    style = {"style": _percent(np.concatenate(right))}
    return {name: value for name, value in report.items() if "top" in name or "nearest" in name} | style


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


def _percent(hits: np.ndarray) -> float:
    return round(100 * float(hits.mean()), 1)


if __name__ == "__main__":
    main()
