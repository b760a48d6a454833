"""What made a picture, as a text, and back.

The text has the form that AUTOMATIC1111's web interface writes and many programs read: the prompt, the negative prompt
behind its label, and a last line of settings (https://github.com/AUTOMATIC1111/stable-diffusion-webui).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calotype.runtime.errors import InputError
from calotype.runtime.untrusted import open_regular
from calotype.runtime.version import __version__

NEGATIVE = "Negative prompt:"
STEPS = "Steps:"
# Prompts that the lines above the settings cannot hold as they are, such as one that has the other's label in it.
EXACT = {"prompt": "Exact prompt", "negative_prompt": "Exact negative prompt"}
FIELDS = {"Sampler": "sampler", "Model hash": "model_hash", "Model": "model", "Version": "version"}
SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
# Control characters but the tabulator and the line feed, and halves of characters, which no file can hold.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
JSON = json.JSONDecoder(strict=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """What made a picture; None is what is not known of another program's.

    Attributes:
        further: what else was asked for, by its label: texts, numbers, sequences of them, or mappings that JSON can
            hold. :func:`parse_parameters` has it as texts.
        version: of the program that drew it.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int
    sampler: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None
    model_hash: str | None = None
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: str | None = f"calotype {__version__}"

    def __str__(self) -> str:
        """All of it: :func:`parse_parameters` gives it back, numbers to their last digit."""
        prompts = {name: getattr(self, name) for name in EXACT}
        plain = self.plain()
        found = _prompts(plain.split("\n")[:-1])
        exact = [f"{EXACT[name]}: {json.dumps(text)}" for name, text in prompts.items() if found[name] != text]
        return ", ".join([plain, *exact])

    def plain(self) -> str:
        """As :meth:`__str__`, and without what only Calotype reads of a prompt that the form cannot hold."""
        lines = [UNPRINTABLE.sub(" ", self.prompt)]
        if self.negative_prompt:
            lines.append(f"{NEGATIVE} {UNPRINTABLE.sub(' ', self.negative_prompt)}")
        settings = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": self.guidance_scale,
            "Seed": self.seed,
            "Size": None if self.width is None else f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": self.model,
            **self.further,
            "Version": self.version,
        }
        given = {name: _text(value) for name, value in settings.items() if value is not None}
        lines.append(", ".join(f"{name}: {_quoted(text)}" for name, text in given.items()))
        return "\n".join(lines)


def parse_parameters(text: str) -> Parameters:
    """The inverse of ``str``, for what AUTOMATIC1111's web interface and programs like it wrote, too.

    Raises:
        InputError: the text has no line of settings.
    """
    lines = text.replace("\r\n", "\n").strip("\0").split("\n")
    starts = [number for number, line in enumerate(lines) if line.lstrip().startswith(STEPS)]
    settings = _settings(", ".join(lines[starts[-1] :])) if starts else {}
    steps = _whole(settings.pop("Steps", ""))
    if steps is None:
        raise InputError("the text has no settings: they are its last line, which begins with 'Steps: ' and a number")
    prompts = _prompts(lines[: starts[-1]])
    for name, label in EXACT.items():
        prompts[name] = settings.pop(label, prompts[name])
    known: dict[str, Any] = {name: settings.pop(label) for label, name in FIELDS.items() if label in settings}
    for label, name, read in (("CFG scale", "guidance_scale", _number), ("Seed", "seed", _whole)):
        known[name] = read(settings.get(label, ""))
        if known[name] is not None:
            del settings[label]
    size = SIZE.fullmatch(settings.get("Size", ""))
    if size is not None:
        del settings["Size"]
        known |= {"width": int(size[1]), "height": int(size[2])}
    return Parameters(**{"version": None, **prompts, "steps": steps, **known, "further": settings})


def file_hash(path: Path) -> str:
    """The first ten digits of the file's SHA-256."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def _prompts(lines: Sequence[str]) -> dict[str, str]:
    """The two prompts, of the lines above the settings."""
    first = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[first:]).removeprefix(NEGATIVE).removeprefix(" ")
    return {"prompt": "\n".join(lines[:first]), "negative_prompt": negative}


def _settings(line: str) -> dict[str, str]:
    """Values by label; of one that comes twice the last."""
    found, position = {}, 0
    while (colon := line.find(":", position)) >= 0:
        label = line[position:colon].rpartition(",")[2].strip()
        value, position = _value(line, colon + 1)
        if label:
            found[label] = value
    return found


def _value(line: str, start: int) -> tuple[str, int]:
    """The value at ``start``, and where the next label begins: text up to a comma, or JSON."""
    while line[start : start + 1] == " ":
        start += 1
    if line[start : start + 1] in ('"', "[", "{"):
        try:
            value, end = JSON.raw_decode(line, start)
        except (ValueError, RecursionError):
            pass
        else:
            rest = re.compile(r" *(,|$)").match(line, end)
            if rest is not None:
                return value if isinstance(value, str) else line[start:end], rest.end()
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return line[start:end].strip(), end + 1


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(_text(item) for item in value)
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, float):  # in full: the same number comes back, and .0 is left out
        return repr(float(value)).removesuffix(".0")
    return str(value)


def _quoted(value: str) -> str:
    if UNPRINTABLE.search(value):
        return json.dumps(value)
    plain = value == value.strip() and not value.startswith(("[", "{")) and not any(mark in value for mark in ',:\n"')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
