"""What people might type for a picture: name, keywords and style in several phrasings."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

WITH_STYLE = (
    "{name}, {style} style",
    "{article} {name}, {style} style",
    "{name} in {style} style",
    "{article} {name} in {style} style",
    "{name} {style}",
    "{style} {name}",
    "{keyword}, {style} style",
    "{name}, {keyword}, {style} style",
)
WITHOUT_STYLE = ("{name}", "{article} {name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji: its name, its other keywords, its group in emojibase and its slug in the icon sets."""

    slug: str
    name: str
    keywords: tuple[str, ...]
    group: int


def held_out(slug: str, style: str) -> bool:
    """Whether the pair is kept from all training: the SHA-256 of ``slug|style`` is 0 modulo 20."""
    return int(hashlib.sha256(f"{slug}|{style}".encode()).hexdigest(), 16) % 20 == 0


def captions(concept: Concept, style: str) -> tuple[str, ...]:
    """Every phrasing for ``concept`` in ``style``, lower-case, without repetitions, in a fixed order."""
    article = "an" if concept.name[0] in "aeiou" else "a"
    found: dict[str, None] = {}
    for template in WITH_STYLE:
        for keyword in concept.keywords if "{keyword}" in template else ("",):
            text = template.format(name=concept.name, article=article, keyword=keyword, style=style)
            found[text.lower()] = None
    return tuple(found)


def sample_caption(concept: Concept, style: str, rng: np.random.Generator) -> str:
    """One phrasing: mostly the name with the style, sometimes keywords, in a twentieth no style at all."""
    article = "an" if concept.name[0] in "aeiou" else "a"
    templates = WITHOUT_STYLE if rng.random() < 0.05 else WITH_STYLE
    template = templates[rng.integers(len(templates))]
    keyword = concept.keywords[rng.integers(len(concept.keywords))] if concept.keywords else concept.name
    return template.format(name=concept.name, article=article, keyword=keyword, style=style).lower()
