"""A worker that fails where a prompt says so; started as a process by tests.

``kill`` and ``segfault`` end it in a run, ``once FILE`` too, where that file is not there yet; ``hang`` stops it for
good; ``memory`` and ``boom`` raise; ``slow`` makes every run last; ``wait FILE`` runs when that file is there. A model
of the name ``late`` is loaded when the file is there that a variable names.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calotype.runtime.pipeline import Pipeline
from calotype.serving.workers import opening, worker
from calotype.serving.workers.messages import Open

advance = Pipeline.advance


def faulty(self: Pipeline, jobs: Sequence[Any]) -> Any:
    for job in jobs:
        prompt = job.request.prompt
        if prompt.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("segfault"):
            ctypes.string_at(0)
        if prompt.startswith("hang"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if prompt.startswith("boom"):
            raise RuntimeError("no kernel in /secret/place/kernels.so")
        if prompt.startswith("memory"):
            raise MemoryError
        if prompt.startswith("slow"):
            time.sleep(0.1)
        if found := re.match(r"wait (\S+)", prompt):
            while not Path(found[1]).exists():
                time.sleep(0.01)
        if (found := re.match(r"once (\S+)", prompt)) and not Path(found[1]).exists():
            Path(found[1]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, jobs)


load = opening.load_model


def late(order: Open) -> Pipeline:
    while order.name == "late" and not Path(os.environ["CALOTYPE_TEST_LATE"]).exists():
        time.sleep(0.01)
    return load(order)


if __name__ == "__main__":
    opening.load_model = late
    Pipeline.advance = faulty  # type: ignore[method-assign]
    if "CALOTYPE_TEST_BROKEN" in os.environ:
        sys.exit(f"cannot open {__file__}")
    if "CALOTYPE_TEST_FREE" in os.environ:
        opening.free_of_device = lambda *_: int(os.environ["CALOTYPE_TEST_FREE"])
    worker.main(sys.argv[1:])
