"""One reader for what others wrote as JSON: the annotations of frozen dataclasses are its schema.

``read`` turns a parsed value into a dataclass, and says of the first thing that is wrong where it stands and what is
valid there. A field without a default has to be there, and an unknown one must not. What a type alone does not say is a
check in its annotation: ``Annotated[int, within(1, 256)]``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar, get_args, get_origin

from calotype.runtime.errors import quoted

MOST_ITEMS = 100_000  # of a list or a table
MOST_LEVELS = 8  # of what has no schema
# Says what is valid, of a value that is not; None of one that is.
Check = Callable[[Any], str | None]
Found = TypeVar("Found")


class SchemaError(ValueError):
    """A value is not what the schema says; the message is one line of a bounded length."""


def within(low: float, high: float) -> Check:
    """Of a number: ``low`` to ``high``, both included."""
    return lambda value: None if low <= value <= high else f"{low:g}..{high:g}"


def matching(pattern: str, words: str) -> Check:
    """Of a text: all of it matches ``pattern``, in words ``words``."""
    compiled = re.compile(pattern)
    return lambda value: None if compiled.fullmatch(value) else words


def one_of(*choices: str) -> Check:
    """Of a text: one of these."""
    return lambda value: None if value in choices else ", ".join(choices)


def at_least_one(value: Any) -> str | None:
    """Of a list or a table: it is not empty."""
    return None if value else "one or more"


def having(*keys: str) -> Check:
    """Of a table: it has these keys."""
    return lambda value: None if value.keys() >= set(keys) else f"with {', '.join(keys)}"


def plain(value: Any) -> str | None:
    """Of what has no schema: printable text, numbers, true, false, null, and a few levels of lists and tables."""
    waiting = [(value, 0)]
    while waiting:
        item, level = waiting.pop()
        if level > MOST_LEVELS:
            return f"at most {MOST_LEVELS} levels of lists and tables"
        if isinstance(item, str) and (valid := _printable(item)) is not None:
            return valid
        if isinstance(item, dict | list):
            waiting += [(inner, level + 1) for inner in item]
        if isinstance(item, dict):
            waiting += [(inner, level + 1) for inner in item.values()]
    return None


def _path(value: str) -> str | None:
    if not value or PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts or "\\" in value:
        return "a path inside the bundle; this one points outside its bundle"
    if str(PurePosixPath(value)) != value or not re.fullmatch(r"[\w.+ -]+(/[\w.+ -]+)*", value, re.ASCII):
        return "a path of letters, digits, dots, dashes and underscores, such as unet.safetensors"
    return None if len(value) <= 400 else "a path of at most 400 characters"


# What is printed holds nothing that steers a terminal.
_printable = matching(
    r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]{0,20000}", "at most 20,000 characters, none to steer a terminal"
)
Text = Annotated[str, _printable]
Name = Annotated[str, matching(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,300}", "one line of at most 300 characters")]
Word = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", "a word such as float16, sd1 or ip-adapter")]
NetworkName = Annotated[str, matching(r"[a-z][a-z0-9_]{0,63}", "a name such as unet or text_encoder_2")]
FilePath = Annotated[str, _path]
GraphPath = Annotated[FilePath, matching(r".*\.onnx", "a file that ends with .onnx")]
WeightsPath = Annotated[FilePath, matching(r".*\.safetensors", "a file that ends with .safetensors")]
Sha256 = Annotated[str, matching(r"[0-9a-f]{64}", "64 digits 0..9 and a..f")]
Size = Annotated[int, within(0, 2**63 - 1)]
Plain = Annotated[Any, plain]


def read(kind: Any, value: Any, where: str) -> Any:
    """The ``value`` at ``where`` as ``kind``: a dataclass, a type annotated with checks, or a table or list of such.

    Raises:
        SchemaError: it is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = read(arguments[0], value, where)
        for check in arguments[1:]:
            if (valid := check(found)) is not None:
                raise SchemaError(f"{where} is {quoted(value)}; valid: {valid}")
        return found
    if origin in (typing.Union, types.UnionType):
        return _one(arguments, value, where)
    if origin is tuple:
        _expect(value, list, where, "a list")
        return tuple(read(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        return _table(arguments[0], arguments[1], value, where)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    return value if kind is Any else _single(kind, value, where)


def read_as(kind: type[Found], value: Any, where: str) -> Found:
    """See :func:`read`: the same for a dataclass, with its type."""
    found: Found = read(kind, value, where)
    return found


def _single(kind: type, value: Any, where: str) -> Any:
    words = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}[kind]
    if kind is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise SchemaError(f"{where} is {quoted(value)}; valid: {words}")
        return float(value)
    if type(value) is not kind:
        raise SchemaError(f"{where} is {quoted(value)}; valid: {words}")
    return value


def _one(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """``value`` as the first of ``kinds`` that it is."""
    if value is None and types.NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return read(kind, value, where)
            except SchemaError as error:
                errors.append(str(error))
    raise SchemaError(" or ".join([errors[0], *(error.rpartition("; valid: ")[2] for error in errors[1:])]))


def _table(keys: Any, items: Any, value: Any, where: str) -> dict[str, Any]:
    _expect(value, dict, where, "a table")
    return {
        read(keys, key, f"a name in {where}"): read(items, item, f"{where}.{quoted(key)[1:-1]}")
        for key, item in value.items()
    }


def _record(kind: Any, value: Any, where: str) -> Any:
    _expect(value, dict, where, "a table")
    hints, own = _hints(kind), [item for item in dataclasses.fields(kind) if item.init]
    unknown = sorted(value.keys() - {item.name for item in own})
    if unknown:
        raise SchemaError(f"{where} has unknown fields: {', '.join(quoted(name)[1:-1] for name in unknown[:8])}")
    nothing = dataclasses.MISSING
    needed = {item.name for item in own if item.default is nothing and item.default_factory is nothing}
    missing = sorted(needed - value.keys())
    if missing:
        raise SchemaError(f"{where} has no {', '.join(missing)}")
    return kind(**{name: read(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _expect(value: Any, kind: type[list[Any] | dict[str, Any]], where: str, words: str) -> None:
    if not isinstance(value, kind):
        raise SchemaError(f"{where} is {quoted(value)}; valid: {words}")
    if len(value) > MOST_ITEMS:
        raise SchemaError(f"{where} has {len(value)} items; valid: at most {MOST_ITEMS}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)
