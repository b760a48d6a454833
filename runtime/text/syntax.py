"""What other programs read in a prompt, and this one as words: each prompt that has it is warned of in one line."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator

from calotype.runtime.errors import InputError

logger = logging.getLogger(__name__)

LORA = r"<(?:lora|lyco):(?P<lora>[^<>]*)>"
# What it looks like, and what to do instead.
SYNTAX = {
    LORA: "give the file with --lora FILE:SCALE, or --prompt-loras to have it read",
    r"<hypernet:[^<>]*>": "hypernetworks are not supported",
    r"\bBREAK\b": "a chunk ends where it is full",
    r"\bAND\b": "prompts are not composed; give one after the other",
    r"\bembedding:[^\s,:()\[\]<>]+": "give the file with --embedding and write its word alone",
    r"<(?:random|wildcard|segment|object|region|alternate|fromto|repeat|setvar|var|embed)(?:\[[^\[\]]*\])?:[^<>]*>": (
        "nothing is filled in; write it out"
    ),
    r"\bADD(?:COMM|BASE|ROW|COL)\b": "regions are not drawn apart; draw them one after the other with --mask",
    r"\)[+-]+(?=[\s,.;)]|$)": "write (words:1.1) for more, (words:0.9) for less",
    r"\b\w{2,}(?:\+{1,4}|-{2,4})(?=[\s,.;)]|$)": "write (word:1.1) for more, (word:0.9) for less",
    r"\)\.(?:and|blend|swap)\([^()]*\)": "prompts are not composed; give one after the other",
    r"(?<![_\w])__[\w/*-]{1,100}?__(?![_\w])": "wildcards are not filled in; write one out",
}
ALTERNATION = "words do not take turns; write one out"
EDITING = "a prompt is the same at every step; write one out"
CHOICE = "none is chosen; write one out"
_BRACKETS = re.compile(r"(?<!\\)\[([^\[\]]*)(?<!\\)\]|(?<!\\)\{([^{}]*)\}")
_NUMBER = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*")
MOST = 4


def take_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its ``<lora:NAME:SCALE>``, and their names and scales, 1 where none stands there.

    As in AUTOMATIC1111, ``<lyco:…>`` is the same, and what stands around it stays as it is.

    Raises:
        InputError: it has no name, or what follows that is not one finite number.
    """
    found = []
    for match in re.finditer(LORA, prompt):
        name, _, scale = match["lora"].partition(":")
        number = 1.0 if not scale else float(scale) if _NUMBER.fullmatch(scale) else math.nan
        if not name or not math.isfinite(number):
            raise InputError(
                f"the prompt has {_short(match.group())!r}, which is no name and one scale; write <lora:NAME:0.8>"
            )
        found.append((name, number))
    return (re.sub(LORA, "", prompt) if found else prompt), found


def prompt_warnings(prompt: str) -> list[str]:
    """At most one line: what in the prompt means something elsewhere, and what is done with it here."""
    found = dict(_found(prompt))
    if not found:
        return []
    said = [f"{_short(text)} ({advice})" for text, advice in list(found.items())[:MOST]]
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return [f"the prompt {_short(prompt)!r} has what is read as words: {', '.join(said)}{more}"]


def _found(prompt: str) -> Iterator[tuple[str, str]]:
    """What stands in the prompt, and what to do instead."""
    for pattern, advice in SYNTAX.items():
        for match in re.finditer(pattern, prompt):
            yield match.group(), advice
    for match in _BRACKETS.finditer(prompt):
        inner, choice = match.groups()
        if choice is not None:
            if "|" in choice:
                yield match.group(), CHOICE
        elif "|" in inner:
            yield match.group(), ALTERNATION
        elif _NUMBER.fullmatch(inner.rpartition(":")[2]) and ":" in inner:
            yield match.group(), EDITING


def _short(text: str, most: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
