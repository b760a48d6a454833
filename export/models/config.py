"""What the configuration classes of this folder have in common: reading a checkpoint's own JSON strictly."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from calotype.runtime.errors import UnsupportedArchitectureError, quoted

WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The part of a component's ``config.json`` that changes the numbers it computes.

    A subclass has one field per supported setting, under the checkpoint's own name. ``neutral`` holds the
    settings this project does not implement, with the values that mean "off"; ``ignored`` those that never
    reach the forward pass; ``nullable`` the fields where null is a value and not the default.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    nullable: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build the configuration from a parsed ``config.json``.

        Raises:
            UnsupportedArchitectureError: for a setting that this project does not implement.
        """
        what = WORDS.sub(" ", cls.__name__.removesuffix("Config"))
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {}
        for key, value in values.items():
            if key in fields:
                if value is not None or key in cls.nullable:
                    known[key] = _frozen(value)
            elif key in cls.neutral:
                if _frozen(value) not in cls.neutral[key]:
                    allowed = " or ".join(repr(choice) for choice in cls.neutral[key])
                    raise UnsupportedArchitectureError(
                        f"the configuration of the checkpoint's {what} says {key}={quoted(value)}, which is not "
                        f"supported; supported: {allowed}"
                    )
            elif not key.startswith("_") and key not in cls.ignored:
                raise UnsupportedArchitectureError(
                    f"the configuration of the checkpoint's {what} says {quoted(key)[1:-1]}={quoted(value)}, which is "
                    "not known here and may change what it computes; this kind of model is not supported"
                )
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, under the names ``from_json`` reads."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def per_block(name: str, value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Diffusers' convention: a setting is one number for all blocks, or a sequence with one for each.

    Raises:
        UnsupportedArchitectureError: for a sequence of another length, or of something else.
    """
    values = value if isinstance(value, tuple) else (value,) * count
    if len(values) != count or not all(isinstance(item, int) for item in values):
        raise UnsupportedArchitectureError(
            f"{name}={value!r} is not supported; supported: {count} whole numbers, or one"
        )
    return values


def check_divides(name: str, divisor: int, channels: tuple[int, ...]) -> None:
    """Normalisation groups and attention heads split channels evenly.

    Raises:
        UnsupportedArchitectureError: when ``divisor``, the setting ``name``, does not divide all ``channels``.
    """
    if divisor < 1 or any(count % divisor for count in channels):
        raise UnsupportedArchitectureError(
            f"{name}={divisor} does not divide the channels {', '.join(map(str, channels))}; "
            "the component's config.json belongs to another model"
        )
