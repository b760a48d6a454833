"""A command whose standard streams are closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, pathlib, subprocess, sys
from calotype.runtime.cli.streams import open_closed_streams
open_closed_streams()
with pathlib.Path(sys.argv[1]).open("wb") as file:
    assert file.fileno() > 2
    os.write(1, b"noise"), os.write(2, b"noise"), print("a"), print("b", file=sys.stderr)
    subprocess.run(["sh", "-c", "echo noise; echo noise >&2"], check=True)
    sys.stdin.read()
    file.write(b"picture")
sys.exit(7)
"""


@pytest.mark.parametrize("redirection", ["</dev/null", "<&-", ">&- </dev/null", "2>&- </dev/null", "<&- >&- 2>&-"])
def test_a_closed_stream_gives_its_number_to_nothing_else(redirection: str, tmp_path: Path) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" "$2" {redirection}', sys.executable, CODE, tmp_path / "picture"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 7
    assert (tmp_path / "picture").read_bytes() == b"picture"


def test_the_command_line_opens_them_first(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$0" -m calotype info nothing <&- >&- 2>&-', sys.executable]
    assert subprocess.run(command, timeout=60, check=False, cwd=tmp_path).returncode == 1
