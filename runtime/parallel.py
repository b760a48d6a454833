"""Work in threads that ends cleanly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_threads(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do ``work`` on each of ``items`` at the same time; the first error stops what has not begun, and is raised."""
    items = list(items)
    if len(items) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, items))
