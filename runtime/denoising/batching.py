"""Which jobs share the next run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from calotype.runtime.denoising.job import Key


class Sharer(Protocol):
    """What is asked of a job here."""

    @property
    def key(self) -> Key:
        """What it must have in common with another."""
        ...

    @property
    def rows(self) -> int:
        """Of its next evaluation."""
        ...


S = TypeVar("S", bound=Sharer)


def pick(jobs: Sequence[S], capacity: Callable[[Key], int]) -> list[S]:
    """The first of ``jobs``, and those behind it that may share its next run while there is room; nothing is changed.

    This alone decides who may share a run. Jobs share one when they need the same network in the same form with the
    same weights, and their rows have the same shapes: the networks have no text mask, so that a prompt padded to
    another's length would be another picture. Step, scheduler, guidance, number of rows and seed may differ.

    Args:
        jobs: in the order in which they are to be served, at least one, none of them done.
        capacity: the most rows of one run of such jobs. The first job is picked even where it is less than its rows:
            the session says what is wrong then.
    """
    first = jobs[0]
    key, picked = first.key, [first]
    room = capacity(key) - first.rows
    for job in jobs[1:]:
        if room <= 0:
            break
        if job.key == key and job.rows <= room:
            picked.append(job)
            room -= job.rows
    return picked
