"""A file of settings: TOML whose keys are the options of a command."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.untrusted import MOST_DIGITS, read_bytes, why

MOST_BYTES = 1 << 16
MOST_DOTS = 500  # of a line: tomllib takes the square of a key's parts


def read_settings(path: Path, options: Collection[str]) -> dict[str, Any]:
    """The settings in ``path`` by option, each as the text, or the list of texts, that the command line would have.

    Args:
        path: a TOML file without tables. A key is an option's long name, with ``-`` or ``_``.
        options: the long names that are known, with ``-``.

    Raises:
        InputError: it cannot be read, is no TOML, has an unknown key or one twice, or a value that is no text, number,
            boolean or list of them.
    """
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8")
        if any(line.count(".") > MOST_DOTS for line in text.split("\n")):
            raise InputError(f"{path} has a line of more than {MOST_DOTS} dots; use fewer")
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except RecursionError:
        raise InputError(f"{path} is not a file of settings in TOML: it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a file of settings in TOML: {why(error)}") from error
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
