"""Pictures that are kept for a while for whoever has their URL, which is signed and says until when."""

from __future__ import annotations

import dataclasses
import hmac
import secrets
import time
from collections.abc import Callable

from calotype.serving.http.limits import Limits

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A picture's file, and when it is forgotten, in seconds since 1970."""

    data: bytes
    kind: str
    until: int


class Kept:
    """In memory alone; what is oldest gives way where they become too many."""

    def __init__(self, limits: Callable[[], Limits], clock: Callable[[], float] = time.time) -> None:
        self._limits, self._clock, self._secret = limits, clock, secrets.token_bytes(32)
        self._files: dict[str, File] = {}

    def __len__(self) -> int:
        self._forget()
        return len(self._files)

    def keep(self, data: bytes, kind: str) -> str:
        """Keep a file of the format ``kind``; returns the end of its URL."""
        limits = self._limits()
        until = int(self._clock() + limits.kept_seconds)
        name = secrets.token_urlsafe(16)
        self._files[name] = File(data=data, kind=kind, until=until)
        self._forget(limits.kept_bytes)
        return f"{name}?expires={until}&signature={self._sign(name, until)}"

    def find(self, name: str, expires: int, signature: str) -> File | None:
        """The file of a URL, unless its signature is not ours, or it is forgotten."""
        self._forget()
        if not hmac.compare_digest(signature.encode(), self._sign(name, expires).encode()):
            return None
        return self._files.get(name)

    def _forget(self, most: int | None = None) -> None:
        """What has expired, and the oldest where there are more than ``most`` bytes."""
        now = self._clock()
        held = sum(len(file.data) for file in self._files.values())
        for name, file in list(self._files.items()):
            if file.until > now and (most is None or held <= most):
                continue
            held -= len(file.data)
            del self._files[name]

    def _sign(self, name: str, expires: int) -> str:
        return hmac.digest(self._secret, f"{name} {expires}".encode(), "sha256").hex()
