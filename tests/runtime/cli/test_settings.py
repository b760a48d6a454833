"""Files of settings: what they may say, and one clear line for what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from calotype.runtime.cli.settings import read_settings
from calotype.runtime.errors import InputError

OPTIONS = {"steps", "guidance-scale", "overwrite", "prompt"}


def test_values_are_what_the_command_line_would_have(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('steps = 20\nguidance_scale = [3, 4.5]\noverwrite = true\nprompt = "ein Äpfelchen"\n')
    assert read_settings(path, OPTIONS) == {
        "steps": "20",
        "guidance-scale": ["3", "4.5"],
        "overwrite": "True",
        "prompt": "ein Äpfelchen",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3\nsize = 4", "unknown settings: stepps, size; valid: guidance-scale, overwrite, prompt, steps"),
        ("[steps]\na = 1", r"has steps = \{'a': 1\}; give a text, a number, true, false or a list of them"),
        ("steps = [[1]]", r"has steps = \[\[1\]\]; give a text"),
        ("steps = 2026-11-24", "has steps = .*; give a text"),
        ("guidance-scale = 3\nguidance_scale = 4", "has the setting guidance-scale twice; keep one"),
        ("steps: 3", "is not a file of settings in TOML"),
        ("steps = 1\nsteps = 2", "is not a file of settings in TOML"),
    ],
)
def test_what_is_wrong_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_settings(path, OPTIONS)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff")
    for name, message in (("a.toml", "is not a file of settings"), ("no.toml", "does not exist"), (".", "is not a")):
        with pytest.raises(InputError, match=message):
            read_settings(tmp_path / name, OPTIONS)
