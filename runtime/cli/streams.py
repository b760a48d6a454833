"""Standard streams that are closed."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Let the null device be what is closed of stdin, stdout and stderr; to be called before anything is opened.

    The next file that is opened would else get the number of the stream, and what libraries print, and programs that
    are started, would go into a picture.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            mode = "r" if descriptor == 0 else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
