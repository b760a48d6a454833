"""Keys: who asks, and how much they may ask for. Of a key only its hash is kept."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from calotype.runtime.errors import InputError, quoted
from calotype.runtime.untrusted import read_bytes, why
from calotype.serving.errors import RateLimitError, RequestRefusedError

MOST_BYTES = 1 << 20  # of a file of keys
SHORTEST = 16  # characters of a key; fewer can be guessed
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
DIGEST = re.compile(r"sha256=([0-9a-f]{64})")
BURST = 6  # a key that may ask for so many pictures a minute may ask for a sixth of them at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key, of which only a hash is kept.

    Attributes:
        name: of who has it, in logs and metrics.
        digest: SHA-256 of the key.
        rate: pictures a minute; None is any number.
        concurrency: pictures that may be on their way at once; None is any number.
        priority: 1.0 is the usual one, and 2.0 waits half as long.
    """

    name: str
    digest: bytes = dataclasses.field(repr=False)
    rate: float | None = None
    concurrency: int | None = None
    priority: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("concurrency", self.concurrency), ("priority", self.priority)):
            if value is not None and not 0 < value < 1e9:
                raise InputError(f"the key {self.name} has {name}={value:g}; give a number above 0")


ANYBODY = Key(name="", digest=b"")  # where no key is needed


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file: lines ``NAME:KEY`` or ``NAME:sha256=DIGEST``, and behind it what the key may.

    That is ``rate=60`` (pictures a minute), ``concurrency=4`` (pictures at once), ``priority=2``. Empty lines, and
    those that begin with ``#``, say nothing.

    Raises:
        InputError: the file cannot be read, or a line is none of these; a key is never quoted.
    """
    try:
        lines = read_bytes(path, MOST_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError:  # what it says quotes bytes of keys
        raise InputError(f"the keys in {path} cannot be read: it is no text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"the keys in {path} cannot be read: {why(error)}") from None
    found = [
        _key(line, f"line {number} of {path}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not found:
        raise InputError(f"{path} has no keys; write lines such as alice:KEY")
    return tuple(found)


def _key(line: str, where: str) -> Key:
    first, *rest = line.split()
    name, colon, secret = first.partition(":")
    digest = DIGEST.fullmatch(secret)
    if not colon or (digest is None and (len(secret) < SHORTEST or secret.startswith("sha256="))):
        raise InputError(
            f"{where} is no key; write NAME:KEY with at least {SHORTEST} characters, or NAME:sha256=DIGEST"
        )
    if not NAME.fullmatch(name):
        raise InputError(f"{where} has the name {quoted(name)}; use up to 64 letters, digits, and . _ -")
    options: dict[str, Any] = {}
    for word in rest:
        option, _, value = word.partition("=")
        read = {"rate": float, "concurrency": int, "priority": float}.get(option)
        try:
            options[option] = read(value) if read else None
        except ValueError:
            options[option] = None
        if options[option] is None:
            raise InputError(f"{where} has {quoted(word)}; valid: rate=NUMBER, concurrency=NUMBER, priority=NUMBER")
    hashed = hashlib.sha256(secret.encode()).digest() if digest is None else bytes.fromhex(digest[1])
    return Key(name=name, digest=hashed, **options)


def find_key(keys: Iterable[Key], headers: Mapping[bytes, bytes]) -> Key | None:
    """The key that a request has, as a bearer's token or as the password of HTTP's basic scheme.

    All keys are compared, in a time that says nothing of how far one fits.
    """
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    secret = token.strip()
    if scheme.lower() == b"basic":
        try:
            secret = base64.b64decode(secret, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    elif scheme.lower() != b"bearer":
        return None
    digest, found = hashlib.sha256(secret).digest(), None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


class Allowance:
    """How much each key may still ask for: pictures a minute, and at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}
        self._running: dict[str, int] = {}

    def take(self, key: Key, pictures: int) -> None:
        """Count ``pictures`` that a key asks for; each of them is to be given back with :meth:`give_back`.

        Raises:
            RateLimitError: they are too many now; nothing is counted.
            RequestRefusedError: they are too many at any time.
        """
        running = self._running.get(key.name, 0)
        if key.concurrency is not None and running + pictures > key.concurrency:
            line = f"the key {key.name} has {running} pictures on their way and may have {key.concurrency}"
            if pictures > key.concurrency:
                raise RequestRefusedError(f"{line}; ask for fewer", param="n")
            raise RateLimitError(line, retry_after=1)
        if key.rate is not None:
            self._take(key, key.rate, pictures)
        self._running[key.name] = running + pictures

    def give_back(self, key: Key, pictures: int = 1) -> None:
        """So many are no longer on their way."""
        left = self._running.get(key.name, 0) - pictures
        if left > 0:
            self._running[key.name] = left
        else:
            self._running.pop(key.name, None)

    def _take(self, key: Key, rate: float, pictures: int) -> None:
        """A bucket that fills with so many a minute, and holds a sixth of them, or as many as one request asks for."""
        now, most = self._clock(), max(1.0, rate / BURST)
        left, then = self._left.get(key.name, (most, now))
        left = min(most, left + (now - then) * rate / 60)
        if left < min(pictures, most):
            missing = (min(pictures, most) - left) * 60 / rate
            raise RateLimitError(f"the key {key.name} may ask for {rate:g} pictures a minute", retry_after=missing)
        self._left[key.name] = (left - pictures, now)  # below zero where one request asks for more than it holds
