"""What people might type for a picture: name, keywords, colour and style in several phrasings."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
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
# What people put around a caption without meaning another picture.
BEFORE = (
    "a drawing of",
    "drawing of",
    "a picture of",
    "picture of",
    "an image of",
    "image of",
    "an illustration of",
    "illustration of",
    "a painting of",
    "a sketch of",
    "a cartoon of",
    "an emoji of",
    "emoji of",
    "emoji:",
    "an icon of",
    "icon of",
    "a sticker of",
    "a photo of",
    "draw",
    "draw me",
    "please draw",
    "show me",
    "make",
    "i want",
    "i would like",
    "one",
    "my",
    "the",
    "this is",
    "cute",
    "a cute",
    "a nice",
    "a simple",
    "a beautiful",
    "a single",
    "masterpiece, best quality,",
)
AFTER = (
    "emoji",
    "icon",
    "please",
    ", please",
    "on white",
    "on a white background",
    ", white background",
    ", simple",
    ", cute",
    ", flat design",
    ", vector art",
    ", clip art",
    ", highly detailed",
    ", high quality",
    ", best quality",
    ", masterpiece",
    ", 4k",
    ".",
    "!",
)
# Drawn at random, so that words without a meaning are passed over even in an order that was never there.
FILLERS = re.findall(
    r"\w+",
    """
    a about all also am an and any are as at be being big but by can do doing every fine for from fun generate get give
    good great have here hey hi how i if in is it just kind let like lovely me more most much must new now of ok on
    only or our out please quick really same see should so some sort such tell thanks that the their them there these
    thing this to today too us very want was what when which will wish with wonderful yes you your
    """,
)
# The same with the style told otherwise, and the caption that it is to be read as.
RESTYLED = (
    ("{name} in the style of {style}", "{name} {style}"),
    ("{article} {name} in the style of {style}", "{name} {style}"),
    ("{name} drawn like {style}", "{name} {style}"),
    ("{name} as a {style} emoji", "{name} {style}"),
    ("{name}, {style}", "{name} {style}"),
    ("{name} ({style})", "{name} {style}"),
    ("{style}: {name}", "{style} {name}"),
    ("{style} emoji of {article} {name}", "{style} {name}"),
    ("{style} emoji: {name}", "{style} {name}"),
    ("the {style} {name}", "{style} {name}"),
)


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


def sample_caption(concept: Concept, style: str, rng: np.random.Generator, colour: str | None = None) -> str:
    """One phrasing: mostly the name with the style, sometimes keywords, in a twentieth no style at all.

    A ``colour`` stands before whatever the phrasing calls the concept: its name, else a keyword.
    """
    template = _template(rng)
    keyword = concept.keywords[rng.integers(len(concept.keywords))] if concept.keywords else concept.name
    return _coloured(template, concept.name, keyword, style, colour)


def sample_synonyms(concept: Concept, keyword: str, style: str, rng: np.random.Generator) -> tuple[str, str]:
    """One phrasing twice: with ``keyword`` where the name stands, and with the name."""
    while "{keyword}" in (template := _template(rng)):
        pass
    return _phrase(template, keyword, "", style), _phrase(template, concept.name, "", style)


def sample_phrasing(
    concept: Concept, style: str, rng: np.random.Generator, colour: str | None = None
) -> tuple[str, str]:
    """A caption as people might put it, and plainly."""
    if rng.random() < 0.25:
        asked, plain = (
            _coloured(template, concept.name, "", style, colour) for template in RESTYLED[rng.integers(len(RESTYLED))]
        )
        return asked, plain
    plain = asked = sample_caption(concept, style, rng, colour)
    before, after = rng.random() < 0.75, rng.random() < 0.4
    if before or not after:
        words = BEFORE[rng.integers(len(BEFORE))]
        if rng.random() < 0.3:
            words = " ".join(rng.choice(FILLERS, rng.integers(1, 6)))
        asked = f"{words} {asked}"
    if after:
        words = AFTER[rng.integers(len(AFTER))]
        asked += words if words[0] in ",.!" else f" {words}"
    return asked, plain


def _template(rng: np.random.Generator) -> str:
    templates = WITHOUT_STYLE if rng.random() < 0.05 else WITH_STYLE
    return templates[rng.integers(len(templates))]


def _coloured(template: str, name: str, keyword: str, style: str, colour: str | None) -> str:
    if colour is None:
        return _phrase(template, name, keyword, style)
    if "{name}" in template:
        return _phrase(template, f"{colour} {name}", keyword, style)
    return _phrase(template, name, f"{colour} {keyword}", style)


def _phrase(template: str, name: str, keyword: str, style: str) -> str:
    article = "an" if name[0] in "aeiou" else "a"
    return template.format(name=name, article=article, keyword=keyword, style=style).lower()
