"""The words that captions are made of: what the model was taught, and nothing else that people type.

The model's card carries them, and so does the bundle; the runtime says which words of a prompt are not among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from training.captions import AFTER, BEFORE, FILLERS, RESTYLED, WITH_STYLE, Concept
from training.colours import WORDS as COLOURS
from training.config import STYLES

WORD = re.compile(r"[^\W\d_]+")


def words(concepts: Iterable[Concept]) -> list[str]:
    """Every word of names, keywords, colours, styles and what stands around them, in lower case and order."""
    texts = [*BEFORE, *AFTER, *FILLERS, *STYLES, *COLOURS, "a an"]
    texts += [re.sub(r"\{\w+\}", " ", template) for pair in RESTYLED for template in pair]
    texts += [re.sub(r"\{\w+\}", " ", template) for template in WITH_STYLE]
    for concept in concepts:
        texts += [concept.name, *concept.keywords]
    return sorted({word for text in texts for word in WORD.findall(text.lower())})
