"""The words that a small model was taught, and those of a prompt that are not among them."""

from __future__ import annotations

import re
from pathlib import Path

from calotype.runtime.errors import BundleError
from calotype.runtime.untrusted import read_bytes, why

WORD = re.compile(r"[^\W\d_]+")
MOST_BYTES = 1 << 22


def read_words(path: Path) -> frozenset[str]:
    """The words of a file, one a line in lower case.

    Raises:
        BundleError: it is no such file.
    """
    try:
        return frozenset(read_bytes(path, MOST_BYTES).decode().split())
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is no list of words: {why(error)}; export the bundle again") from error


def unknown_words(prompt: str, words: frozenset[str]) -> list[str]:
    """Each word of ``prompt`` that is not in ``words``, in the order in which they stand there."""
    return [word for word in dict.fromkeys(WORD.findall(prompt.lower())) if word not in words]
