r"""Weighted prompts, and prompts longer than a text encoder takes at once.

The syntax is AUTOMATIC1111's (https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features):

- ``(word:1.3)`` weighs a word 1.3, ``(word)`` 1.1, ``[word]`` 1/1.1; nested brackets multiply;
- ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` stand for the character itself;
- a bracket without its partner is text.

A weight ``w`` moves a token's embedding ``e`` away from that of the empty prompt at its position, ``z``, to
``z + w·(e - z)``: compel's rule for weights above one, here for all. AUTOMATIC1111 scales ``e`` itself and divides by
the change of the mean, which is close to zero in some encoders and then turns the embedding upside down.

A long prompt is cut into chunks of as many tokens as fit between start and end token; each is encoded alone, and their
embeddings follow one another. A textual inversion of several vectors is in one chunk.
"""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np
from numpy.typing import NDArray

from calotype.runtime import arguments
from calotype.runtime.errors import InputError
from calotype.runtime.text.tokenizer import ClipTokenizer

logger = logging.getLogger(__name__)

MAX_CHUNKS = 16
MAX_WEIGHT = 100.0
EMPHASIS = {"(": 1.1, "[": 1 / 1.1}
_PARTS = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|(?P<close>(?::\s*+(?P<weight>[+-]?+(?:\d++\.?+\d*+|\.\d++))\s*+)?+\)|\])"
    r"|(?P<text>[^\\()\[\]:]++|[\\:])"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """One input of a text encoder: ids (T,), and a weight for each (T,); None where all are one."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None


def parse_prompt(prompt: str) -> list[tuple[str, float]]:
    """Stretches of text with their weights, neighbours of equal weight joined.

    Raises:
        InputError: a weight is beyond ``MAX_WEIGHT`` either way, or it is longer than a prompt may be.
    """
    parts = list(_PARTS.finditer(arguments.prompt("the prompt", prompt)))
    factors = _matched(parts)
    open_products = {"(": [1.0], "[": [1.0]}
    pieces: list[tuple[list[str], float]] = []
    for index, part in enumerate(parts):
        if index in factors:
            bracket, factor = factors[index]
            products = open_products[bracket]
            if part["open"]:
                products.append(products[-1] * factor)
            else:
                products.pop()
            continue
        weight = open_products["("][-1] * open_products["["][-1]
        if not abs(weight) <= MAX_WEIGHT:
            raise InputError(f"the prompt weighs {part.group()[:40]!r} {weight:g}; valid: up to {MAX_WEIGHT:g}")
        text = part["escaped"] or part.group()
        if pieces and pieces[-1][1] == weight:
            pieces[-1][0].append(text)
        else:
            pieces.append(([text], weight))
    return [("".join(texts), weight) for texts, weight in pieces]


def chunked(prompt: str, tokenizer: ClipTokenizer) -> list[Chunk]:
    """The prompt as inputs of a text encoder, at least one; beyond ``MAX_CHUNKS`` it is cut off with a warning.

    Raises:
        InputError: as :func:`parse_prompt`, or the prompt is not valid Unicode.
    """
    length = tokenizer.max_length - 2
    rows: list[list[tuple[int, float]]] = [[]]
    for text, weight in parse_prompt(prompt):
        words = tokenizer.words(text)
        for number, word in enumerate(words):
            # An embedding is moved to the next chunk rather than cut, but one that no chunk can hold.
            for ids in [word] if len(word) <= length else [[own] for own in word]:
                if len(rows[-1]) + len(ids) > length:
                    rows.append([])
                rows[-1] += [(own, weight) for own in ids]
            if len(rows) > MAX_CHUNKS:
                cut = text[tokenizer.position(text, sum(map(len, words[:number]))) :]
                quoted = cut if len(cut) <= 80 else f"{cut[:77]}..."
                logger.warning("the prompt has more than %d tokens; cut off from here: %r", MAX_CHUNKS * length, quoted)
                return [_chunk(tokenizer, row) for row in rows[:MAX_CHUNKS]]
    return [_chunk(tokenizer, row) for row in rows]


def _matched(parts: list[re.Match[str]]) -> dict[int, tuple[str, float]]:
    """The brackets that have a partner, by index: their kind and the weight between them."""
    waiting: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, tuple[str, float]] = {}
    for index, part in enumerate(parts):
        if part["open"]:
            waiting[part["open"]].append(index)
        elif part["close"]:
            bracket = "[" if part["close"] == "]" else "("
            if waiting[bracket]:
                factor = EMPHASIS[bracket] if part["weight"] is None else float(part["weight"])
                factors[index] = factors[waiting[bracket].pop()] = (bracket, factor)
    return factors


def _chunk(tokenizer: ClipTokenizer, row: list[tuple[int, float]]) -> Chunk:
    ids = tokenizer.pack([own for own, _ in row])
    if all(weight == 1 for _, weight in row):
        return Chunk(ids=ids)
    padded = np.ones(tokenizer.max_length, np.float32)
    padded[1 : len(row) + 1] = [weight for _, weight in row]
    return Chunk(ids=ids, weights=padded)
