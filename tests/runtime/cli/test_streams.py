"""Standard streams that are closed, full, no UTF-8, or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREPARED = """
import os, sys
from calotype.runtime.cli.streams import PrintingError, drop_results, prepare_streams
prepare_streams()
"""


def python(code: str, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PREPARED + code],
        capture_output=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_characters_that_an_encoding_has_not() -> None:
    result = python("print('a\\u2026\\udcff'); print('\\u2026', file=sys.stderr)", PYTHONIOENCODING="latin-1")
    assert (result.stdout, result.stderr) == (b"a\\u2026\\udcff\n", b"\\u2026\n")
    result = python("print('caf\\u00e9 \\u2026')", PYTHONIOENCODING="utf-8")
    assert result.stdout == "café …\n".encode()


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_gives_its_number_to_nothing_else(redirection: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    code = f"""
import pathlib
path = pathlib.Path({str(path)!r})
with path.open("wb") as file:
    assert file.fileno() > 2
    os.write(1, b"noise"); os.write(2, b"noise"); print("a"); print("b", file=sys.stderr)
    assert not os.read(0, 1) if "<" in {redirection!r} else True
    file.write(b"picture")
sys.exit(7)
"""
    assert python(code, redirection).returncode == 7
    assert path.read_bytes() == b"picture"


def test_what_cannot_be_printed_is_told_from_other_troubles() -> None:
    code = """
try:
    print("a", flush=True)
except PrintingError as error:
    drop_results()
    print(error.strerror, file=sys.stderr)
try:
    raise FileNotFoundError(2, "No usable temporary directory found")
except PrintingError:
    raise
except OSError as error:
    print(error.strerror, file=sys.stderr)
"""
    result = python(code, ">/dev/full")
    assert result.stderr == b"No space left on device\nNo usable temporary directory found\n"
    assert result.returncode == 0


def test_a_pipe_that_nobody_reads() -> None:
    code = """
import errno
try:
    for _ in range(10_000):
        print("a" * 100)
    sys.stdout.flush()
except PrintingError as error:
    assert error.errno == errno.EPIPE
    drop_results()
    sys.exit(3)
"""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([sys.executable, "-c", PREPARED + code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (3, b"")
