"""Every error this project raises on purpose. A message names the value, the valid choices and the way out."""

from __future__ import annotations

import importlib.util
import re
import reprlib
import shlex
import sys
from pathlib import Path

LONGEST_MESSAGE = 2000
LONGEST_VALUE = 200
# Control characters, line separators, marks that turn the direction of writing, and halves of characters.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TORCH_FOR_CPU = "torch --index-url https://download.pytorch.org/whl/cpu"


def shortened(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """``text``, or where it is longer than ``limit`` its two ends, and how much is left out between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … ({len(text) - 2 * half} characters left out) … {text[-half:]}"


def printable(text: str) -> str:
    """``text`` with its control characters but tabulators and line feeds escaped, as JSON escapes them."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """``text`` in one printable line of bounded length: what libraries say, and it quotes, can be several."""
    return printable(" ".join(shortened(text).split()))


def quoted(value: object) -> str:
    """``value`` as an error quotes it: as Python writes it, control characters escaped, and never a long line."""
    if isinstance(value, str):
        return repr(shortened(value, LONGEST_VALUE))
    if isinstance(value, int) and value.bit_length() > 1000:  # of more digits Python prints none
        return f"a whole number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxother = short.maxlong = LONGEST_VALUE
    try:
        text = short.repr(value)
        return shortened(" ".join("".join(own if own.isprintable() else " " for own in text).split()), LONGEST_VALUE)
    except Exception:  # a value may fail to write itself
        return f"<{type(value).__name__}>"


def install_line(extra: str) -> str:
    """What to type to install an extra. The package is not published: it is installed from its clone."""
    from importlib.metadata import distributions  # slow to import, and seldom needed

    clone = Path(__file__).resolve().parent.parent
    here = (clone / "pyproject.toml").is_file()
    pip = f"{shlex.quote(sys.executable)} -m pip" if here else "pip"
    what = f"-e {shlex.quote(f'{clone}[{extra}]')}" if here else f"'.[{extra}]' in a clone of Calotype"
    if extra == "export" and importlib.util.find_spec("torch") is None:
        return f"{pip} install {TORCH_FOR_CPU} (unless it is for an NVIDIA GPU), then {pip} install {what}"
    if extra == "cuda" and any(distributions(name="onnxruntime")):
        # The two packages share one folder, so what one of them takes away the other has to bring again.
        return f"{pip} uninstall onnxruntime, then {pip} install --force-reinstall {what}"
    return f"{pip} install {what}"


class CalotypeError(Exception):
    """The root of the tree: catching it catches whatever the user can do something about.

    A message is one line that steers no terminal, and not a long one, whatever it quotes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(shortened(str(message)).replace("\n", " ")))


class BundleError(CalotypeError):
    """A bundle is missing, incomplete, corrupt, or of a format this version does not read."""


class CheckpointError(CalotypeError):
    """A checkpoint cannot be read, or its tensors do not match the architecture it claims."""


class UnsupportedArchitectureError(CheckpointError):
    """A checkpoint is sound, but of an architecture this project does not implement."""


class ExportError(CalotypeError):
    """An export failed, or its graphs do not compute what the PyTorch modules compute."""


class BuildError(CalotypeError):
    """An engine could not be built, or the plan cache could not be used."""


class BackendError(CalotypeError):
    """A backend is unknown, not installed, or has no hardware to run on; or it failed while running."""


class InputError(CalotypeError, ValueError):
    """An argument of a call, an option or a settings file is out of range or does not fit the model."""


class OutputError(CalotypeError):
    """A result cannot be written where it was asked for."""


class MissingPackageError(CalotypeError, ImportError):
    """A package that an extra installs is not there."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: {install_line(extra)}")
