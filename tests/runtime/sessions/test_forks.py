"""A forked child refuses a session of its parent's in one line, may open its own, and comes to its end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from calotype.runtime.sessions import device

PROGRAM = """
import os, sys
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import CalotypeError
from calotype.runtime.sessions import open_session
from calotype.runtime.sessions.low_memory import Turn, TurnTakingSession

bundle, sizes = Bundle.open("talbot"), {"rows": 1, "tokens": 32, "height": 2, "width": 2}
spec = bundle.manifest.networks["unet_shallow"]

def opened():
    return open_session(bundle.path, spec, "cpu")

session, turns = opened(), TurnTakingSession(spec, opened, Turn())
for own in (session, turns):
    own.run(sizes)
child = os.fork()
if child == 0:
    for own in (session, turns):
        for call in (own.run, own.reserve):
            try:
                call(sizes)
            except CalotypeError as error:
                print(error)
    with opened() as own:
        own.run(sizes)
    session.close()
    turns.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
session.run(sizes)
turns.close()
session.close()
"""


def test_a_forked_child_is_told_what_to_do_and_ends() -> None:
    """Without, it would run, and then wait for threads that are not there."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "7"
    assert len(lines) == 5
    assert set(lines[:-1]) == {
        "unet_shallow.fp32.onnx was opened before this process was forked, and cannot run in it; open it after the "
        'fork, or start processes with multiprocessing.get_context("spawn")'
    }
    assert done.stderr == ""


def test_a_forked_child_has_no_gpu_of_its_parent_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_shared", {0: object()})
    monkeypatch.setattr(device, "_guard", threading.Lock())
    read, write = os.pipe()
    with device._guard:  # held by another thread
        child = os.fork()
        if child == 0:
            os.write(write, f"{device._shared} {device._guard.locked()}".encode())
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"{} False"
    for file in (read, write):
        os.close(file)
