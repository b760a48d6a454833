"""Files of settings: what they may say, and one clear line for what they may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


TEXTS = {
    "deep": "steps = " + "[" * 100_000,
    "deep table": "a" + ".a" * 100_000 + " = 1",
    "long": "steps = " + "1" * 5000,
    "long hexadecimal": "steps = 0x" + "f" * 5000,
    "large": "#" * (2 << 20),
    "date": "steps = 1979-05-27",
    "table": "steps = {a = 1}",
    "control": 'steps = "\x1b[2J"',
    "unknown": "x" * 10_000 + " = 1",
    "twice": "steps = 1\nsteps = 2",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_hostile_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_settings(tmp_path / "a.toml", ["steps", "seed"])
    one_line(caught.value)


def test_a_pipe_is_no_settings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.toml")
    with pytest.raises(InputError, match="It is a pipe, a device or a socket, not a file"):
        read_settings(tmp_path / "a.toml", ["steps"])


def one_line(error: Exception) -> None:
    assert str(error).isprintable() and len(str(error)) < 1000


TOML = st.lists(
    st.tuples(
        st.sampled_from(["steps", "seed", "s_t", '"a b"', "a.b", "[t]", "[[t]]"]),
        st.sampled_from(["1", "1.5", "nan", "true", '"x"', "'''", "[1, 2]", "[[1]]", "{a = 1}", "07:32:00", "0o7", "="])
        | st.text(max_size=8),
    ),
    max_size=4,
).map(lambda lines: "\n".join(f"{key} = {value}" for key, value in lines).encode(errors="replace"))


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found = read_settings(path, ["steps", "seed"])
    except InputError as error:
        one_line(error)
    else:
        assert found.keys() <= {"steps", "seed"}


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=TOML | st.binary(max_size=20))
def test_any_file_is_settings_or_one_line(tmp_path: Path, data: bytes) -> None:
    survives(tmp_path / "a.toml", data)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=TOML | st.binary())
def test_very_many_files(tmp_path: Path, data: bytes) -> None:
    survives(tmp_path / "a.toml", data)
