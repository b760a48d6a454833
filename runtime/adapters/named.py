"""LoRAs as they are asked for: by a file or a folder, or by the name under which one was registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.runtime.adapters.files import DIFFUSERS_WEIGHTS, PEFT_CONFIG
from calotype.runtime.adapters.lora import Lora
from calotype.runtime.adapters.names import NETWORKS
from calotype.runtime.arguments import finite, listed
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.untrusted import why

SUFFIX = ".safetensors"
MOST = 10_000  # entries of a folder
SHOWN = 20  # names in a message
MOST_NAME = 200  # characters
MOST_LORAS = 64  # of one picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedLora:
    """A LoRA by the name it was registered under when the pipeline was loaded, and how much of it; see :class:`Lora`.

    Raises:
        InputError: the name is no text, or the scale no finite number.
    """

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= MOST_NAME:
            raise InputError(f"a LoRA's name={quoted(self.name)} is no name; give a text of up to {MOST_NAME} letters")
        try:
            object.__setattr__(self, "scale", finite("scale", self.scale))
        except InputError:
            raise InputError(
                f"the LoRA {quoted(self.name)} has the scale {quoted(self.scale)}; give a finite number, such as 0.8"
            ) from None


Asked = Lora | NamedLora


def asked(value: Any) -> Asked:
    """A LoRA as a caller may give it.

    Args:
        value: a :class:`Lora` or a :class:`NamedLora`; a path or a text; or one of the latter with a scale, a pair. A
            text is a path where it has a separator, ends in ``.safetensors`` or is that of a file or folder; else it is
            the name of a registered one.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(value, Lora | NamedLora):
        return value
    if not _is_asked(value):
        raise InputError(
            f'a LoRA is {quoted(value)}; give a file, a name, or a pair such as ("style.safetensors", 0.8)'
        )
    return _of(value, 1.0) if isinstance(value, str | Path) else _of(value[0], value[1])


def asked_all(name: str, value: Any) -> tuple[Asked, ...]:
    """A list of LoRAs as a caller may give it, see :func:`asked`; None is an empty one.

    Raises:
        InputError: it is none, whose message begins with ``name``; or it is longer than ``MOST_LORAS``.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(map(_is_asked, value)):
        raise InputError(f'{name}={quoted(value)} is no list of LoRAs; give [("style.safetensors", 0.8)]')
    if len(value) > MOST_LORAS:
        raise InputError(f"{len(value)} LoRAs are more than the {MOST_LORAS} that one picture takes; use fewer")
    return tuple(map(asked, value))


def parse(text: str) -> Asked:
    """Read ``FILE``, ``NAME``, ``FILE:SCALE`` or ``NAME:SCALE``; see :func:`asked` for which is which."""
    found = Lora.parse(text)
    return _of(str(found.path) if found.path.name else text, found.scale)


def registered(folder: Path | None) -> dict[str, Path]:
    """The LoRAs in ``folder``, not in its sub-folders, by name.

    A file's name is without ``.safetensors``; a folder by PEFT or diffusers has its own.

    Raises:
        InputError: it is no folder, holds too much, or has one name twice.
    """
    found: dict[str, Path] = {}
    if folder is None:
        return found
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else None
    except (OSError, ValueError) as error:
        message = f"lora_folder={quoted(str(folder))} cannot be read: {why(error)}; name another folder"
        raise InputError(message) from error
    if entries is None:
        raise InputError(f"lora_folder={quoted(str(folder))} is no folder; name one that holds LoRAs")
    for number, path in enumerate(entries):
        if number >= MOST:
            raise InputError(f"{quoted(str(folder))} holds more than {MOST} files; name a smaller folder")
        name = path.stem if path.suffix == SUFFIX and path.is_file() else path.name
        if path.name == name and not _is_adapter(path):
            continue
        if name in found:
            both = f"{quoted(found[name].name)} and {quoted(path.name)}"
            raise InputError(f"{quoted(str(folder))} has {both}, both by the name {quoted(name)}")
        found[name] = path
    return found


def chosen(lora: Asked, known: Mapping[str, Path]) -> Lora:
    """The LoRA that is asked for; ``known`` are the registered ones.

    Raises:
        InputError: none of that name is registered.
    """
    if isinstance(lora, Lora):
        return lora
    path = known.get(lora.name)
    if path is None:
        names = sorted(known)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        there = quoted(", ".join(names[:SHOWN]))[1:-1] + more if names else "none, since no folder of LoRAs was named"
        raise InputError(f"there is no LoRA {quoted(lora.name)}; valid: {there}; a file is given by its path")
    return Lora(path=path, scale=lora.scale)


def _is_asked(value: Any) -> bool:
    pair = listed(value) and len(value) == 2 and isinstance(value[0], str | Path)
    return pair or isinstance(value, Lora | NamedLora | str | Path)


def _of(given: str | Path, scale: float) -> Asked:
    bare = isinstance(given, str) and Path(given).name == given and not given.endswith(SUFFIX)
    if bare and not Path(given).exists():
        return NamedLora(name=str(given), scale=scale)
    return Lora(path=Path(given), scale=scale)


def _is_adapter(path: Path) -> bool:
    configs = [PEFT_CONFIG, DIFFUSERS_WEIGHTS, *(f"{network}/{PEFT_CONFIG}" for network in NETWORKS)]
    return path.is_dir() and any((path / name).is_file() for name in configs)
