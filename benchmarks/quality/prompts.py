"""How pairs are asked for: by name, or by keyword, in a colour, or with words around the name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from training.captions import own_keywords
from training.colours import others, own_colours
from training.data import Dataset

Pairs = Sequence[dict[str, str]]

# The first is among those that the text encoder was taught; most words of the second were never there.
PHRASINGS = ("a drawing of a {name}, {style} style", "we need {name} artwork for our website, {style} style")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """Pairs, by title a prompt for each, and maybe by title the colour that each one's picture is to have."""

    pairs: Pairs
    prompts: dict[str, list[str]]
    colours: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def by_name(pairs: Pairs) -> Ask:
    """All pairs."""
    return Ask(pairs=pairs, prompts={"by name": [_prompt(pair["name"], pair) for pair in pairs]})


def by_keyword(dataset: Dataset, pairs: Pairs) -> Ask:
    """The pairs whose concept alone has a keyword, by the first such one."""
    keywords = {slug: words[0] for slug, words in own_keywords(dataset.concepts).items() if words}
    ask = by_name([pair for pair in pairs if pair["slug"] in keywords])
    return Ask(
        pairs=ask.pairs,
        prompts=ask.prompts | {"by keyword": [_prompt(keywords[pair["slug"]], pair) for pair in ask.pairs]},
    )


def in_words(_dataset: Dataset, pairs: Pairs) -> Ask:
    """All pairs, with words around the name."""
    return Ask(pairs=pairs, prompts={form: [form.format(**pair) for pair in pairs] for form in PHRASINGS})


def in_colour(dataset: Dataset, pairs: Pairs) -> Ask:
    """The pairs whose picture can be recoloured: by name, in the picture's own colour, and in another.

    Which other is told by the pair's place in the list: they take turns.
    """
    places, own = dataset.places(), own_colours(dataset)
    found = [(pair, own.get(places[pair["slug"], pair["style"]], "")) for pair in pairs]
    found = [(pair, colour) for pair, colour in found if others(colour)]
    ask = by_name([pair for pair, _ in found])
    other = [others(colour)[place % len(others(colour))] for place, (_, colour) in enumerate(found)]
    wanted = {"in its own colour": [colour for _, colour in found], "in another colour": other}
    prompts = {
        title: [_prompt(f"{colour} {pair['name']}", pair) for pair, colour in zip(ask.pairs, colours, strict=True)]
        for title, colours in wanted.items()
    }
    # By name alone, how often is it that colour anyway?
    return Ask(pairs=ask.pairs, prompts=ask.prompts | prompts, colours={"by name": other} | wanted)


ASK = {"keywords": by_keyword, "colours": in_colour, "phrasings": in_words}


def _prompt(words: str, pair: dict[str, str]) -> str:
    return f"{words}, {pair['style']} style"
