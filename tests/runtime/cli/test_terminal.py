"""What other people wrote, on somebody's terminal."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from calotype.runtime.cli.main import LineFormatter, run
from calotype.runtime.errors import one_line, printable
from calotype.runtime.pictures.writing import save_new
from tests.runtime.pictures.samples import chunk, small_png
from tests.runtime.pictures.test_embedded import GRAPH
from tests.runtime.pictures.test_parameters import PARAMETERS

HOSTILE = "a\x1b]0;title\x07\x9b31m\x08\u202e\u2028b\r\x7f"
ESCAPED = "a\\u001b]0;title\\u0007\\u009b31m\\u0008\\u202e\\u2028b\\u000d\\u007f"


def test_control_characters_are_escaped() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("Äpfel 🍎\tو\n") == "Äpfel 🍎\tو\n"
    assert printable("half \udc80").encode() == b"half \\udc80"
    assert one_line("a\n\tb\x1b") == "a b\\u001b"
    assert len(one_line("a" * 10**7)) < 2100


def test_settings_of_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{HOSTILE}\nSteps: 3, Model: {HOSTILE}"
    path = tmp_path / "a.png"
    path.write_bytes(small_png(behind=chunk(b"tEXt", b"parameters\0" + text.encode())))
    assert run(["info", str(path)]) == 0
    assert capsys.readouterr().out == f"{ESCAPED}\nSteps: 3, Model: {ESCAPED}\n"
    assert run(["info", str(path), "--json"]) == 0
    said = capsys.readouterr().out
    assert not any(character in said for character in "\x1b\x07\x9b\x08\u202e\u2028\r\x7f")
    assert json.loads(said)["parameters"] == text
    assert json.loads(said)["settings"]["steps"] == 3


def test_a_graph_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.PNG"
    path.write_bytes(small_png(before=chunk(b"tEXt", b"prompt\0" + json.dumps(GRAPH).encode())))
    assert run(["info", str(path)]) == 0
    assert capsys.readouterr().out == (
        "a graph of ComfyUI with 2 nodes: KSampler, SaveImage; Calotype does not run graphs\n"
    )
    assert run(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"comfyui": GRAPH}


def test_the_settings_of_our_own_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_new(Image.new("RGB", (8, 8)), tmp_path / "a.webp", dataclasses.replace(PARAMETERS, prompt="Äpfel"))
    assert run(["info", str(path), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["prompt"], settings["further"]["Eta"]) == ("Äpfel", "0.30000000000000004")


def test_log_lines_are_lines() -> None:
    record = logging.LogRecord("a", logging.WARNING, __file__, 1, "%s", ("x\n\x1b[31m" + "y" * 10**6,), None)
    line = LineFormatter("%(levelname)s: %(message)s").format(record)
    assert line.startswith("WARNING: x \\u001b[31myyy") and len(line) < 2100 and "\n" not in line


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_terminals_that_are_not_utf_8(
    encoding: str, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = save_new(Image.new("RGB", (8, 8)), tmp_path / "a.png", dataclasses.replace(PARAMETERS, prompt="🍎 ä"))
    with open(1, "w", encoding=encoding, closefd=False) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert run(["info", str(path)]) == 0
        assert run(["build", "--help"]) == 0
    assert capfdbinary.readouterr().out.startswith("🍎 ä".encode(encoding, errors="backslashreplace") + b"\n")


def test_closed_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save_new(Image.new("RGB", (8, 8)), tmp_path / "a.png", PARAMETERS)
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert run(["info", str(path)]) == 0
    assert run(["info", str(tmp_path / "no.png")]) == 2
