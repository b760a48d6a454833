"""What people might type for a picture: name, keywords and style in several phrasings."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable

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


def own_keywords(concepts: Iterable[Concept]) -> dict[str, tuple[str, ...]]:
    """By slug, the keywords that are no other concept's keyword or name, in their order; a concept may have none."""
    found = {concept.slug: concept for concept in concepts}
    uses = collections.Counter(word for own in found.values() for word in {own.name, *own.keywords})
    return {slug: tuple(word for word in own.keywords if uses[word] == 1) for slug, own in found.items()}


def captions(concept: Concept, style: str) -> tuple[str, ...]:
    """Every phrasing for ``concept`` in ``style``, lower-case, without repetitions, in a fixed order."""
    found: dict[str, None] = {}
    for template in WITH_STYLE:
        for keyword in concept.keywords if "{keyword}" in template else ("",):
            found[_phrase(template, concept.name, keyword, style)] = None
    return tuple(found)


def sample_caption(concept: Concept, style: str, rng: np.random.Generator) -> str:
    """One phrasing: mostly the name with the style, sometimes keywords, in a twentieth no style at all."""
    template = _template(rng)
    keyword = concept.keywords[rng.integers(len(concept.keywords))] if concept.keywords else concept.name
    return _phrase(template, concept.name, keyword, style)


def sample_synonyms(concept: Concept, keyword: str, style: str, rng: np.random.Generator) -> tuple[str, str]:
    """One phrasing twice: with ``keyword`` where the name stands, and with the name."""
    while "{keyword}" in (template := _template(rng)):
        pass
    return _phrase(template, keyword, "", style), _phrase(template, concept.name, "", style)


def _template(rng: np.random.Generator) -> str:
    templates = WITHOUT_STYLE if rng.random() < 0.05 else WITH_STYLE
    return templates[rng.integers(len(templates))]


def _phrase(template: str, name: str, keyword: str, style: str) -> str:
    article = "an" if name[0] in "aeiou" else "a"
    return template.format(name=name, article=article, keyword=keyword, style=style).lower()
