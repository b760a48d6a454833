"""What is shown on a terminal: nothing that other people wrote moves its cursor, or hides in its colours."""

from __future__ import annotations

import re

import click

from calotype.runtime.errors import shortened

# Control characters, line separators, marks that turn the direction of writing, and halves of characters.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with its control characters but tabulators and line feeds escaped, as JSON escapes them."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """``text`` in one printable line of bounded length: what libraries say, and it quotes, can be several."""
    return printable(" ".join(shortened(text).split()))


def show(text: str) -> None:
    """Print a result."""
    click.echo(printable(text))
