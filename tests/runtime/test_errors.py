"""Messages, whatever they quote."""

from __future__ import annotations

import numpy as np
import pytest

from calotype.runtime.errors import (
    BundleError,
    CalotypeError,
    InputError,
    MissingPackageError,
    install_line,
    quoted,
    shortened,
)


@pytest.mark.parametrize("kind", [CalotypeError, InputError, BundleError])
def test_no_message_is_long_and_both_its_ends_stay(kind: type[CalotypeError]) -> None:
    message = str(kind(f"steps='{'9' * 10_000_000}' is not a whole number; use 20"))
    assert len(message) < 2100
    assert message.startswith("steps='999")
    assert message.endswith("9' is not a whole number; use 20")
    assert " … (9998038 characters left out) … " in message


def test_short_messages_stay_as_they_are() -> None:
    assert str(InputError("seed=-1 is outside")) == "seed=-1 is outside"
    assert str(MissingPackageError("torch", "export")) == (
        f"torch is not installed; install it with: {install_line('export')}"
    )
    assert shortened("abcdef", 4) == "ab … (2 characters left out) … ef"


def test_no_message_steers_a_terminal_whatever_it_quotes() -> None:
    said = str(InputError("\x1b]0;owned\x07 a  b\nc\u202e\udcff é 漢 of a LoRA's key"))
    assert said == "\\u001b]0;owned\\u0007 a  b c\\u202e\\udcff é 漢 of a LoRA's key"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\x1b[31m\n", r"'a\x1b[31m\n'"),
        (0.5, "0.5"),
        (None, "None"),
        (10**5000, "a whole number of 16610 bits"),
    ],
    ids=["text", "number", "nothing", "long"],
)
def test_values_are_quoted_as_python_writes_them(value: object, text: str) -> None:
    assert quoted(value) == text


def test_values_are_quoted_with_a_bound() -> None:
    for value in ("a" * 10**7, b"a" * 10**7, ["a" * 10**6] * 100, {"a" * 10**6: 1}, np.zeros(10**6), Broken()):
        assert len(quoted(value)) < 300
