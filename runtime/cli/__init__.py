"""The command line, one command a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from calotype.runtime.cli.streams import open_closed_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit codes: 0, 1 (failed), 2 (wrong usage), 130 (interrupted)."""
    open_closed_streams()
    try:
        from calotype.runtime.cli.main import run  # it takes a while, in which one can be interrupted too

        code = run(arguments)
    except KeyboardInterrupt:
        print("calotype: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
