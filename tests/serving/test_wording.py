"""What is said of a failure names no place on this machine."""

from __future__ import annotations

import pytest

from calotype.runtime.errors import InputError
from calotype.serving.wording import said, without_paths


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cannot read /models/photo/unet.onnx:\n no such file", "cannot read unet.onnx: no such file"),
        ("there is no bundle '/home/me/x'", "there is no bundle 'x'"),
        ('File "/usr/lib/python3/x.py", line 3', 'File "x.py", line 3'),
        ("~/models/a is no model", "a is no model"),
        ("(/tmp/a/b.so)", "(b.so)"),
        ("models/photo/unet.onnx is missing from the bundle", "unet.onnx is missing from the bundle"),
        ("'../secret/models/a' is no bundle", "'a' is no bundle"),
        ("/srv/my models/photo/unet.onnx is gone", "my unet.onnx is gone"),
        ("//home/me/x", "x"),
        ("open failed:/home/me/x.safetensors", "open failed:x.safetensors"),
        ("file:///home/me/x", "x"),
        ("see https://example.org/docs/page.json", "see https://example.org/docs/page.json"),
        ("see https://example.org/docs/page", "see https://example.org/docs/page"),
        ("a ratio of 3/4 and text/plain", "a ratio of 3/4 and text/plain"),
    ],
)
def test_of_a_path_the_last_part_stays(text: str, wanted: str) -> None:
    assert without_paths(text) == wanted


def test_an_exception_of_others_is_named() -> None:
    assert said(InputError("steps=0 is too few")) == "steps=0 is too few"
    assert said(RuntimeError("broken /a/b")) == "RuntimeError: broken b"
    assert said(RuntimeError()) == "RuntimeError"
