"""Is a picture of the concept, and in the colour, that was asked for? Sought among real pictures in that colour."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks.quality.features import Array, features, top
from training.colours import others, own_colours
from training.data import Dataset
from training.palette import main_colour, recolour

Pairs = Sequence[dict[str, str]]


class ColourJudge:
    """Real pictures of a style that have a main colour with a hue, all of them in one colour, are a shelf."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._own = {n: colour for n, colour in own_colours(dataset).items() if others(colour)}

    @functools.cache  # noqa: B019  (a few dozen shelves, which live as long as the judge)
    def shelf(self, style: str, colour: str) -> tuple[list[str], Array]:
        """The slugs of a style's pictures, and their features in ``colour``."""
        chosen = [n for n in self._own if self._dataset.styles[n] == style]
        pictures = [self._dataset.pictures[n] for n in chosen]
        turned = [
            picture if self._own[n] == colour else recolour(picture, colour)
            for n, picture in zip(chosen, pictures, strict=True)
        ]
        slugs = [self._dataset.concepts[n].slug for n in chosen]
        return slugs, features([Image.fromarray(picture) for picture in turned])

    def __call__(self, drawn: list[Image.Image], pairs: Pairs, colours: Sequence[str]) -> dict[str, float]:
        """In per cent, by split: the real one is among its shelf's five nearest; the main colour is the asked one."""
        found = []
        for picture, query, pair, colour in zip(drawn, features(drawn), pairs, colours, strict=True):
            slugs, shelf = self.shelf(pair["style"], colour)
            near = top(query[None], shelf, np.array([slugs.index(pair["slug"])]), 5)[0]
            found.append((near, main_colour(np.asarray(picture.convert("RGB"))) == colour))
        hits, unseen = np.array(found), np.array([pair["split"] == "held_out" for pair in pairs])
        report = {}
        for split, mask in (("seen", ~unseen), ("held_out", unseen)):
            for name, share in zip(("in_colour_top5", "colour"), hits[mask].mean(axis=0), strict=True):
                report[f"{split}_{name}"] = round(100 * float(share), 1)
        return report

    def ceiling(self, pairs: Pairs, colours: Sequence[str]) -> float:
        """Per cent of the real pictures of ``pairs``, recoloured, whose main colour is the asked one."""
        places = self._dataset.places()
        real = [self._dataset.pictures[places[pair["slug"], pair["style"]]] for pair in pairs]
        right = [
            main_colour(recolour(picture, colour)) == colour for picture, colour in zip(real, colours, strict=True)
        ]
        return round(100 * float(np.mean(right)), 1)
