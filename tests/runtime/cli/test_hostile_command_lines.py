"""Command lines that nobody should type: each is followed, or refused in one line, without a traceback."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.runtime.cli.generate import command
from tests.runtime.command_line import calotype

OPTIONS = sorted(
    option
    for parameter in command.params
    for option in parameter.opts
    if option.startswith("--") and option != "--help"
)
TEXTS = (
    *("", "-", "--", "0", "-1", "1", "0.5", "3,2,1", "1,", ",", "1e400", "nan", "inf", "1_0", "９", "0x10", "9" * 5000),
    *("x", "a b", "\x1b[31m", "\udcff", "%n", "{}", "~", ".", "/", "/dev/null", "nowhere/x.png", "folder", "x" * 5000),
    *(
        "x.png",
        "pipe.png",
        "loop.png",
        "empty.toml",
        "deep.toml",
        "deep.json",
        "ddim",
        "karras",
        "float16",
        "cpu",
        "a:b:c",
    ),
)
WORDS = st.sampled_from(OPTIONS) | st.sampled_from(TEXTS) | st.text(max_size=3).filter(lambda text: "\0" not in text)
LINES = st.lists(WORDS, max_size=5)
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they run: a picture that is none, a folder, a link to itself, and files nested deep."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "folder").mkdir()
    (folder / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "empty.toml").touch()
    (folder / "deep.toml").write_text("steps = " + "[" * 20_000)
    (folder / "deep.json").write_text('{"steps": ' + "[" * 100_000)
    return folder


def check(folder: Path, model: Path, line: list[str]) -> None:
    # Whatever stands there, the rest makes one small picture of a tiny model in little time.
    usual = ["-m", str(model), "--threads", "1", "--backend", "cpu", "-o", "picture.png", "--overwrite"]
    small = ["--steps", "1", "-W", "16", "-H", "16", "--images", "1"]
    ran = calotype("generate", "a", *line, *usual, *small, cwd=folder)
    said = [text for text in ran.stderr.splitlines() if not text.startswith(("WARNING:", "INFO:"))]
    assert "Traceback" not in ran.stderr
    assert "\x1b" not in ran.stderr
    assert ran.returncode in (0, 1, 2)
    if ran.returncode != 0:
        assert ran.stdout == ""
        assert said and said[-1].startswith("calotype: "), ran.stderr
        assert sum(text.startswith("calotype: ") for text in said) == 1
        assert max(map(len, said)) < 2500


@given(line=LINES)
@settings(max_examples=25, deadline=None, suppress_health_check=SHARED)
def test_any_line_draws_or_is_refused_in_one_line(folder: Path, format1: Path, line: list[str]) -> None:
    check(folder, format1, line)


@pytest.mark.slow
@given(line=LINES)
@settings(max_examples=2000, deadline=None, suppress_health_check=SHARED)
def test_many_more_lines_draw_or_are_refused_in_one_line(folder: Path, format1: Path, line: list[str]) -> None:
    check(folder, format1, line)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_takes_a_text_or_refuses_it(folder: Path, format1: Path, option: str) -> None:
    for text in TEXTS:
        check(folder, format1, [option, text])


@pytest.mark.parametrize("command", ["info", "verify", "build", "bench", "export"])
def test_every_command_refuses_what_is_no_file_of_its_own(folder: Path, command: str) -> None:
    for text, *more in itertools.product(("x.png", "loop.png", "deep.json", "nowhere", "\udcff", "x" * 5000), ("",)):
        ran = calotype(command, *[word for word in (text, *more) if word], cwd=folder)
        assert ran.returncode in (1, 2), (text, ran)
        assert "Traceback" not in ran.stderr and ran.stderr.splitlines()[-1].startswith("calotype: ")
        assert len(ran.stderr.splitlines()[-1]) < 2500
