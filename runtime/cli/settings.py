"""A file of settings: TOML whose keys are the options of a command."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from calotype.runtime.errors import InputError


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
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is not a file of settings in TOML: {error}") from error
    settings: dict[str, Any] = {}
    unknown = [key for key in values if key.replace("_", "-") not in options]
    if unknown:
        raise InputError(f"{path} has unknown settings: {', '.join(unknown)}; valid: {', '.join(sorted(options))}")
    for key, value in values.items():
        name = key.replace("_", "-")
        if name in settings:
            raise InputError(f"{path} has the setting {name} twice; keep one")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise InputError(f"{path} has {key} = {value!r}; give a text, a number, true, false or a list of them")
        settings[name] = [str(item) for item in items] if isinstance(value, list) else str(value)
    return settings
