"""Who gets in: with which key, under which name of this server, from which page and which address."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from calotype.runtime.errors import InputError, quoted
from calotype.serving.errors import AccessError, ForbiddenError, MediaTypeError
from calotype.serving.http.keys import ANYBODY, Key, find_key
from calotype.serving.http.logs import record_of

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What is answered without a key: whether the server lives, what it can do, its page, and pictures by their signed URLs.
OPEN = re.compile(r"/|/livez|/readyz|/openapi\.json|/favicon\.ico|/page(/.*)?|/v1/images/kept/[^/]*")
# What asks for these knows an address, and no name; there is nothing in them for a page of others.
HEALTH = frozenset({"/livez", "/readyz"})
ADMIN = "/admin/"
METRICS = "/metrics"
FORMS = frozenset({"/v1/images/edits"})  # these take multipart/form-data, all others JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Who gets in.

    Attributes:
        keys: one of them is needed; without any, only this machine gets in.
        admin_keys: for ``/admin``; without any, nobody gets in there.
        hosts: names that a request may come under, ``*`` any of them; None is this machine's without keys, and any
            with keys, which no page of others has.
        origins: of pages that may ask, such as ``https://example.com``, beside the server's own.
        proxies: addresses or networks whose ``X-Forwarded-For`` is believed.

    Raises:
        InputError: two keys have one name, or an address is none.
    """

    keys: tuple[Key, ...] = ()
    admin_keys: tuple[Key, ...] = ()
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    networks: tuple[Network, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        for keys in (self.keys, self.admin_keys):
            twice = {key.name for key in keys if sum(other.name == key.name for other in keys) > 1}
            if twice:
                raise InputError(f"two keys have the name {min(twice)}; give each its own")
        try:
            networks = tuple(ipaddress.ip_network(text, strict=False) for text in self.proxies)
        except ValueError as error:
            raise InputError(f"a trusted proxy is no address: {error}") from None
        object.__setattr__(self, "networks", networks)


class Gate:
    """The layer that lets requests in, or says why not; ``scope["calotype_key"]`` is the key of one that is in."""

    def __init__(self, app: ASGIApp, access: Callable[[], Access]) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            headers, access, record = dict(scope["headers"]), self._access(), record_of(scope)
            record.address = address_of(scope, headers, access)
            scope["scheme"] = scheme_of(scope, headers, access)
            if scope["path"] not in HEALTH:
                check_names(headers, access)
            key = admit(scope["path"], headers, access, record.address)
            record.client, scope["calotype_key"] = key.name, key
            _check_kind(scope, headers)
        await self._app(scope, receive, send)


def admit(path: str, headers: Mapping[bytes, bytes], access: Access, address: str) -> Key:
    """The key of a request for ``path``.

    Raises:
        AccessError: it needs one.
    """
    if path.startswith(ADMIN) or path == ADMIN.rstrip("/"):
        key = find_key(access.admin_keys, headers)
        if key is None:
            raise AccessError("this needs a key of the operator, as Authorization: Bearer KEY")
        return key
    if OPEN.fullmatch(path):
        return ANYBODY
    if not access.keys:
        if not local(address):
            raise AccessError("without keys only this machine gets in; start the server with --api-key-file")
        return ANYBODY
    keys = (*access.keys, *access.admin_keys) if path == METRICS else access.keys
    key = find_key(keys, headers)
    if key is None:
        given = "the key is not known" if b"authorization" in headers else "a key is needed"
        raise AccessError(f"{given}; send one as Authorization: Bearer KEY")
    return key


def check_names(headers: Mapping[bytes, bytes], access: Access) -> None:
    """Refuse what comes under another name (DNS rebinding), or from a page of another site; raises ForbiddenError."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    hosts = access.hosts if access.hosts is not None else ("*",) if access.keys else LOOPBACK
    if "*" not in hosts and _name(host) not in {name.lower().strip("[]") for name in hosts}:
        raise ForbiddenError(f"this server is not called {quoted(host)}; the option --allowed-host gives it more names")
    origin = headers.get(b"origin")
    if origin is None:
        return
    page = origin.decode("latin-1").lower()
    if page not in {own.lower() for own in access.origins} and (not host or urlsplit(page).netloc != host):
        raise ForbiddenError(f"pages of {quoted(page)} may not ask here; the option --allowed-origin lets them")


def address_of(scope: Scope, headers: Mapping[bytes, bytes], access: Access) -> str:
    """Where a request comes from: the last address before those of trusted proxies; "" of a socket file."""
    peer = _peer(scope)
    chain = [part.strip() for part in headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",") if part.strip()]
    while chain and _trusted(peer, access):
        peer = chain.pop()
        if _address(peer) is None:
            return "unknown"
    return peer


def scheme_of(scope: Scope, headers: Mapping[bytes, bytes], access: Access) -> str:
    """``http`` or ``https``, as the client has it: of a trusted proxy, what that says."""
    own: str = scope["scheme"]
    said = headers.get(b"x-forwarded-proto", b"").decode("latin-1").strip().lower()
    return said if said in ("http", "https") and _trusted(_peer(scope), access) else own


def local(address: str) -> bool:
    """Whether it is this machine's."""
    found = _address(address)
    return not address or (found is not None and found.is_loopback)


def _check_kind(scope: Scope, headers: Mapping[bytes, bytes]) -> None:
    """A body is JSON, or a form where those are taken: no page of others can send JSON without asking before."""
    body = headers.get(b"transfer-encoding") is not None or headers.get(b"content-length", b"0").strip() != b"0"
    if not body or scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    wanted = "multipart/form-data" if scope["path"] in FORMS else "application/json"
    if kind != wanted:
        raise MediaTypeError(f"the body is of the type {quoted(kind)}; send {wanted}")


def _name(host: str) -> str:
    """Without a port."""
    found = re.fullmatch(r"\[(.*)\](:\d+)?|([^:]*)(:\d+)?", host)
    return "" if found is None else (found[1] or found[3] or "")


def _peer(scope: Scope) -> str:
    """The address at the other end of the connection; "" of a socket file."""
    return str(scope["client"][0]) if scope.get("client") else ""


def _trusted(peer: str, access: Access) -> bool:
    """Whether it is a proxy's; over a socket file only this machine's programs come."""
    address = _address(peer)
    return not peer or (address is not None and any(address in network for network in access.networks))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
