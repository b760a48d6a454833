"""Who vouches for an archive of plans: its user, by its sha256, or by a key whose signature lies beside it.

Signatures are those of minisign (https://jedisct1.github.io/minisign/): Ed25519 over the file's BLAKE2b-512, with a
trusted comment that is signed, too. Its program makes keys and signatures; py-minisign checks them here.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.errors import InputError, MissingPackageError, quoted
from calotype.runtime.untrusted import open_regular, read_bytes, why

MOST_SIGNATURE = 1 << 14  # bytes: minisign's own comments have up to 8 KiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trust:
    """What the user said; one of them is needed, and all that are given have to hold.

    Attributes:
        sha256: of the archive, in hexadecimal digits.
        key: a public key of minisign, as text or as the path of a file with it.
        signature: where the archive's signature lies; None is beside it, with ``.minisig`` after its name.
    """

    sha256: str | None = None
    key: str | None = None
    signature: Path | None = None

    def __post_init__(self) -> None:
        if self.sha256 is None and self.key is None:
            raise InputError(
                "plans are programs, and are installed only from whom you trust: give --sha256 with what calotype "
                "plans pack printed, or --key with the public key of who signed the archive"
            )
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise InputError(f"the sha256 {quoted(self.sha256)} is none; valid: 64 hexadecimal digits")
        if self.signature is not None and self.key is None:
            raise InputError("a signature alone proves nothing; give --key with the public key that you trust")

    def check(self, copy: Path, named: Path) -> None:
        """Raise InputError where the archive ``copy``, of the file ``named``, is not what the user vouches for.

        Raises:
            MissingPackageError: signatures cannot be checked here.
        """
        if self.sha256 is not None:
            found = FileRecord.of(copy).sha256
            if found != self.sha256.lower():
                raise InputError(f"{named} has the sha256 {found}, not the one given; nothing was installed")
        if self.key is not None:
            _check_signature(copy, self.signature or named.with_name(named.name + ".minisig"), self.key, named)


def _check_signature(copy: Path, beside: Path, key: str, named: Path) -> None:
    try:
        import minisign
    except ModuleNotFoundError as error:
        raise MissingPackageError("minisign", "plans") from error
    try:
        public = _public_key(minisign, key)
    except (OSError, ValueError) as error:
        raise InputError(f"{quoted(key)} is no public key of minisign: {why(error)}") from error
    try:
        signature = minisign.Signature.from_bytes(read_bytes(beside, MOST_SIGNATURE))
    except FileNotFoundError:
        raise InputError(f"{named} is not signed: {beside} does not exist; name another with --signature") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{beside} is no signature of minisign: {why(error)}") from error
    if not signature.is_prehashed():  # it would be checked over the whole file in memory
        raise InputError(f"{beside} is a signature of minisign's old kind; sign again, without its option -l")
    try:
        with open_regular(copy) as file:
            public.verify(file, signature)
    except ValueError as error:
        raise InputError(f"{beside} is not that key's signature of {named.name}: {why(error)}") from error


def _public_key(minisign: Any, key: str) -> Any:
    """The key that is written out, or in a file of that name."""
    if re.fullmatch(r"RW[A-Za-z0-9+/]{54}", key):
        return minisign.PublicKey.from_base64(key)
    return minisign.PublicKey.from_bytes(read_bytes(Path(key), MOST_SIGNATURE))
