"""What is said of a failure: one line, and nothing in it tells where things lie on this machine."""

from __future__ import annotations

import re

from calotype.runtime.errors import shortened

LONGEST = 500
# An absolute path, or a home's, up to what ends it in a sentence; its last part stays. An address of the web is none.
PATH = re.compile(r"(?:(?<![\w/.:])|(?<=:)(?=/[^/])|\bfile:)~?(?:/[^\s/'\"`,;:()<>|]*)*/([^\s/'\"`,;:()<>|]*)")
# One from the folder at hand: with dots, or to a file of a kind that lies in bundles.
RELATIVE = re.compile(
    r"(?<![\w/.:-])(?:\.{0,2}|[\w.-]+)/(?:[\w.-]+/)*([\w.-]+\.(?:onnx|safetensors|json|txt|plan|toml|py|so))\b"
)
UPWARDS = re.compile(r"(?<![\w/.])(?:\.\.?/)+(?:[\w.-]+/)*([\w.-]*)")


def without_paths(text: str) -> str:
    r"""``text`` in one line, of every path in it the last part alone.

    >>> without_paths("cannot read /models/photo/unet.onnx:\n no such file")
    'cannot read unet.onnx: no such file'
    """
    text = " ".join(text.split())
    for pattern in (PATH, RELATIVE, UPWARDS):
        text = pattern.sub(lambda found: found[1], text)
    return shortened(text, LONGEST)


def said(error: BaseException) -> str:
    """One line of what an exception says, with its kind where that is no error of this project's."""
    from calotype.runtime.errors import CalotypeError

    text = without_paths(str(error))
    return text if isinstance(error, CalotypeError) else f"{type(error).__name__}: {text}".removesuffix(": ")
