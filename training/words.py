"""Write the words that captions are made of, one a line: what the model was taught, and nothing else that people type.

``python -m training.words FILE``. The runtime says which words of a prompt are not among them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from training import data
from training.captions import AFTER, BEFORE, FILLERS, RESTYLED, WITH_STYLE, Concept
from training.colours import WORDS as COLOURS
from training.config import GPU, PACKAGES, STYLES

WORD = re.compile(r"[^\W\d_]+")


def words(concepts: Iterable[Concept]) -> list[str]:
    """Every word of names, keywords, colours, styles and what stands around them, in lower case and order."""
    texts = [*BEFORE, *AFTER, *FILLERS, *STYLES, *COLOURS, "a an"]
    texts += [re.sub(r"\{\w+\}", " ", template) for pair in RESTYLED for template in pair]
    texts += [re.sub(r"\{\w+\}", " ", template) for template in WITH_STYLE]
    for concept in concepts:
        texts += [concept.name, *concept.keywords]
    return sorted({word for text in texts for word in WORD.findall(text.lower())})


def taught() -> list[str]:
    """The words of the concepts that the bundled model draws, from the sets' own names."""
    npm = GPU.work.parent / "npm"
    drawn = [set(data.read_package(PACKAGES[style], "icons.json", npm)["icons"]) for style in STYLES]
    names = data.read_package(PACKAGES["names"], "en/data.json", npm)
    return words(data.concepts(names, GPU.groups, drawn))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(taught()) + "\n", encoding="utf-8")
