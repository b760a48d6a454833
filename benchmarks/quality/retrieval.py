"""Whether a drawn picture is near the real one in the space of ``features.py``, and in the style that was asked for."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from benchmarks.quality.features import Array, LinearClassifier, features, top
from training import data
from training.config import STYLES

PAIRS = Path(__file__).with_name("pairs.csv")


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


def read_pairs(every: int = 1) -> list[dict[str, str]]:
    """The pairs that are asked for, or every so many of them."""
    with PAIRS.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))[::every]


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


def _percent(hits: np.ndarray) -> float:
    return round(100 * float(hits.mean()), 1)
