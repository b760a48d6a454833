"""The command line, one command a file."""

from __future__ import annotations

from calotype.runtime.cli.main import main

__all__ = ["main"]
