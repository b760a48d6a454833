"""A file of settings: TOML whose keys are the options of a command."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.untrusted import MOST_DIGITS, read_toml


def read_settings(path: Path, options: Collection[str]) -> dict[str, Any]:
    """The settings in ``path`` by option, each as the text, or the list of texts, that the command line would have.

    Args:
        path: a TOML file without tables. A key is an option's long name, with ``-`` or ``_``.
        options: the long names that are known, with ``-``.

    Raises:
        InputError: it cannot be read, is no TOML, has an unknown key or one twice, or a value that is no text, number,
            boolean or list of them.
    """
    values = read_toml(path)
    settings: dict[str, Any] = {}
    unknown = [quoted(key)[1:-1] for key in values if key.replace("_", "-") not in options]
    if unknown:
        valid = ", ".join(sorted(options))
        raise InputError(f"{path} has unknown settings: {', '.join(unknown[:8])}; valid: {valid}")
    for key, value in values.items():
        name = key.replace("_", "-")
        if name in settings:
            raise InputError(f"{path} has the setting {name} twice; keep one")
        items = value if isinstance(value, list) else [value]
        if not all(map(_is_plain, items)):
            found = f"{key} = {quoted(value)}"
            raise InputError(f"{path} has {found}; give a text, a number, true, false or a list of them")
        settings[name] = [str(item) for item in items] if isinstance(value, list) else str(value)
    return settings


def _is_plain(value: Any) -> bool:
    """Text, a number that is no longer than numbers are, or true or false."""
    return isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10 ** (MOST_DIGITS + 1))
