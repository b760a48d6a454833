"""What is shown on a terminal: nothing that other people wrote moves its cursor, or hides in its colours."""

from __future__ import annotations

import click

from calotype.runtime.errors import printable


def show(text: str) -> None:
    """Print a result."""
    click.echo(printable(text))
