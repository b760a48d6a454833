"""Who gets in, and who does not."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import openai
import pytest

from calotype.runtime.errors import InputError
from calotype.serving.errors import AccessError, ForbiddenError, RateLimitError, RequestRefusedError
from calotype.serving.http.drawing import Settings
from calotype.serving.http.keys import Allowance, Key, find_key, read_keys
from calotype.serving.http.security import Access, address_of, admit, check_names, scheme_of
from tests.serving.conftest import Place

ALICE, BOB, ROOT = "alice-0123456789abcdef", "bob-0123456789abcdef", "root-0123456789abcdef"


def key(secret: str, **fields: Any) -> Key:
    return Key(name=secret.partition("-")[0], digest=hashlib.sha256(secret.encode()).digest(), **fields)


KEYED = Access(keys=(key(ALICE, priority=2.0), key(BOB, concurrency=2)), admin_keys=(key(ROOT),))


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    path.write_text(f"# who asks\n\nalice:{ALICE} rate=60 priority=2\nbob:sha256={digest} concurrency=3\n")
    alice, bob = read_keys(path)
    assert (alice.name, alice.rate, alice.concurrency, alice.priority) == ("alice", 60, None, 2)
    assert (bob.name, bob.rate, bob.concurrency, bob.priority) == ("bob", None, 3, 1)
    for secret, own in ((ALICE, alice), (BOB, bob)):
        assert find_key((alice, bob), {b"authorization": b"Bearer " + secret.encode()}) == own
    assert ALICE not in repr(alice) and alice.digest.hex() not in repr(alice)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys; write lines such as alice:KEY"),
        ("alice", "line 1 of .* is no key"),
        ("alice:short", "is no key; write NAME:KEY with at least 16 characters"),
        (f"\nalice:sha256={'0' * 63}", "line 2 of .* is no key"),
        (f"al/ice:{ALICE}", "has the name 'al/ice'"),
        (f"alice:{ALICE} rate=many", "has 'rate=many'; valid: rate=NUMBER"),
        (f"alice:{ALICE} colour=1", "has 'colour=1'; valid"),
        (f"alice:{ALICE} rate=0", "has rate=0; give a number above 0"),
        (f"alice:{ALICE} priority=nan", "has priority=nan"),
    ],
)
def test_files_of_keys_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as found:
        read_keys(path)
    assert ALICE not in str(found.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(InputError, match="two keys have the name alice"):
        Access(keys=(key(ALICE), key(ALICE)))
    with pytest.raises(InputError, match="a trusted proxy is no address"):
        Access(proxies=("example.com",))


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f"Bearer {BOB}", "bob"),
        (f"bearer  {BOB} ", "bob"),
        ("Basic " + base64.b64encode(f"anyone:{BOB}".encode()).decode(), "bob"),
        (f"Bearer {BOB}x", None),
        ("Bearer ", None),
        ("", None),
        (BOB, None),
        ("Basic ä", None),
        ("Basic " + base64.b64encode(BOB.encode()).decode(), None),
    ],
)
def test_how_a_key_is_sent(header: str, name: str | None) -> None:
    found = find_key(KEYED.keys, {b"authorization": header.encode("latin-1")})
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize("path", ["/v1/models", "/v1/images/generations", "/sdapi/v1/options", "/nowhere", "/metrics"])
def test_without_keys_only_this_machine_gets_in(path: str) -> None:
    for address in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", ""):
        assert admit(path, {}, Access(), address).name == ""
    for address in ("192.168.0.2", "8.8.8.8", "::2", "unknown"):
        with pytest.raises(AccessError, match="only this machine gets in"):
            admit(path, {}, Access(), address)


def test_what_is_open_to_everybody() -> None:
    for path in ("/", "/livez", "/readyz", "/openapi.json", "/page/page.js", "/v1/images/kept/abc"):
        assert admit(path, {}, KEYED, "8.8.8.8").name == ""
    for path in ("/v1/images/kept/", "/v1/images/kept/a/b", "/livez/", "//", "/Page/x", "/page"):
        if path not in ("/v1/images/kept/", "/page"):
            with pytest.raises(AccessError):
                admit(path, {}, KEYED, "8.8.8.8")


def test_keys_over_the_socket(place: Place) -> None:
    place.front.settings = Settings(access=KEYED)
    for secret, message in (("wrong", "the key is not known"), (ROOT, "the key is not known")):
        with place.client(secret) as client, pytest.raises(openai.AuthenticationError, match=message) as found:
            client.images.generate(prompt="x")
        assert found.value.code == "invalid_api_key" and found.value.response.headers["www-authenticate"]
    assert place.ask("GET", "/v1/models")[0] == 401 and place.ask("GET", "/metrics")[0] == 401
    assert place.ask("GET", "/metrics", Authorization=f"Bearer {ROOT}")[0] == 200
    assert place.ask("GET", "/livez")[0] == 200
    with place.client(ALICE) as client:
        client.images.generate(prompt="x")
    (task,) = place.service.submitted
    assert (task.client, task.priority) == ("alice", 2.0)


def test_a_key_has_so_many_pictures_on_their_way_at_once(place: Place) -> None:
    place.front.settings = Settings(access=KEYED)
    place.service.held = True
    with place.client(BOB) as bob, place.client(ALICE) as alice:
        stream = bob.images.generate(prompt="x", n=2, stream=True)
        with pytest.raises(openai.RateLimitError, match="bob has 2 pictures on their way and may have 2") as found:
            bob.images.generate(prompt="x")
        assert found.value.response.headers["retry-after"] == "1" and found.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match="ask for fewer"):
            bob.images.generate(prompt="x", n=3)
        place.service.held = False
        assert alice.images.generate(prompt="x").data
        list(stream)
        assert bob.images.generate(prompt="x", n=2).data


def test_a_key_has_so_many_pictures_a_minute() -> None:
    now = 100.0
    allowance, own = Allowance(lambda: now), key(ALICE, rate=60)
    for _ in range(10):
        allowance.take(own, 1)
    with pytest.raises(RateLimitError, match="alice may ask for 60 pictures a minute") as found:
        allowance.take(own, 1)
    assert found.value.retry_after == pytest.approx(1)
    now += 1
    allowance.take(own, 1)
    now += 60
    allowance.take(own, 30)  # more than it holds: what it has is enough, and the next waits for it
    with pytest.raises(RateLimitError) as found:
        allowance.take(own, 1)
    assert found.value.retry_after == pytest.approx(21)
    with pytest.raises(RequestRefusedError):
        Allowance().take(key(BOB, concurrency=2), 3)


def test_what_is_given_back_can_be_taken_again() -> None:
    allowance, own = Allowance(), key(BOB, concurrency=2)
    for _ in range(3):
        allowance.take(own, 2)
        allowance.give_back(own)
        allowance.take(own, 1)
        allowance.give_back(own, 2)


@pytest.mark.parametrize(
    ("host", "origin", "access", "let"),
    [
        (b"localhost:8000", None, Access(), True),
        (b"127.0.0.1:8000", b"http://127.0.0.1:8000", Access(), True),
        (b"[::1]:8000", b"http://[::1]:8000", Access(), True),
        (b"LOCALHOST", None, Access(), True),
        (b"evil.example", None, Access(), False),
        (b"evil.example:8000", b"http://evil.example:8000", Access(), False),
        (b"localhost.evil.example", None, Access(), False),
        (b"", None, Access(), False),
        (b"localhost:8000", b"http://evil.example", Access(), False),
        (b"localhost:8000", b"http://localhost:3000", Access(), False),
        (b"localhost:8000", b"null", Access(), False),
        (b"localhost:8000", b"https://app.example", Access(origins=("https://app.example",)), True),
        (b"box.example", None, Access(hosts=("box.example",)), True),
        (b"localhost", None, Access(hosts=("box.example",)), False),
        (b"any.example", b"https://any.example", KEYED, True),
        (b"any.example", b"https://evil.example", KEYED, False),
    ],
)
def test_names_and_pages(host: bytes, origin: bytes | None, access: Access, let: bool) -> None:
    headers = {b"host": host} if origin is None else {b"host": host, b"origin": origin}
    if let:
        check_names(headers, access)
    else:
        with pytest.raises(ForbiddenError):
            check_names(headers, access)


def test_pages_of_others_over_the_socket(place: Place) -> None:
    body, json = b'{"prompt": "x"}', "application/json"
    post = lambda **headers: place.ask("POST", "/v1/images/generations", body, **headers)[0]  # noqa: E731
    assert post(content_type=json) == 200
    assert post(content_type=f"{json}; charset=utf-8", origin=place.url) == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert post(content_type=kind) == 415
    assert post(content_type=json, origin="https://evil.example") == 403
    assert post(content_type=json, host="evil.example") == 403
    assert place.ask("GET", "/v1/models", host="evil.example")[0] == 403
    assert place.ask("GET", "/readyz", host="10.0.0.7:8000")[0] == 200
    assert place.ask("POST", "/v1/images/edits", body, content_type=json)[0] == 415
    status, headers, _ = place.ask(
        "OPTIONS", "/v1/images/generations", origin=place.url, access_control_request_method="POST"
    )
    assert status == 405 and not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "proxies", "address"),
    [
        ("10.0.0.1", "1.2.3.4", (), "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4", ("10.0.0.0/8",), "1.2.3.4"),
        ("10.0.0.1", "127.0.0.1, 1.2.3.4", ("10.0.0.1",), "1.2.3.4"),
        ("10.0.0.1", "1.2.3.4, 10.0.0.9", ("10.0.0.0/8",), "1.2.3.4"),
        ("10.0.0.1", "127.0.0.1, what", ("10.0.0.1",), "unknown"),
        ("10.0.0.1", "", ("10.0.0.1",), "10.0.0.1"),
        (None, "1.2.3.4", (), "1.2.3.4"),
        (None, "", (), ""),
    ],
)
def test_where_a_request_comes_from(peer: str | None, forwarded: str, proxies: tuple[str, ...], address: str) -> None:
    scope = {"client": None if peer is None else (peer, 1)}
    assert address_of(scope, {b"x-forwarded-for": forwarded.encode()}, Access(proxies=proxies)) == address


@pytest.mark.parametrize(
    ("said", "proxies", "scheme"),
    [
        (b"https", ("127.0.0.1",), "https"),
        (b"https", (), "http"),
        (b"javascript", ("127.0.0.1",), "http"),
        (b"", ("127.0.0.1",), "http"),
    ],
)
def test_how_a_client_has_come(said: bytes, proxies: tuple[str, ...], scheme: str) -> None:
    scope = {"client": ("127.0.0.1", 1), "scheme": "http"}
    assert scheme_of(scope, {b"x-forwarded-proto": said}, Access(proxies=proxies)) == scheme
