"""Plans carried to another machine: what comes back is what was packed, and nothing that nobody vouches for."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minisign
import pytest

from calotype.engine import archive, cache
from calotype.engine.archive import open_archive, pack, unpack
from calotype.engine.cache import Built, clean_plans, obtain, plan_path
from calotype.engine.trust import Trust
from calotype.runtime.errors import BuildError, InputError, MissingPackageError
from calotype.runtime.sessions.plans import cache_folder, describe_plan, list_plans, plan_trouble, weights_of
from tests.engine.test_cache import KEY
from tests.runtime.command_line import calotype

CPU = {name: KEY[name] for name in ("bundle", "network", "version", "graph", "weights", "precision")}
CPU |= {"backend": "cpu", "processor": "a processor of another planet"}
# Made by the program minisign 0.11: its public key, and its signature of the text.
SIGNED = b"plans that stand for others\n"
PUBLIC = "RWSWsGhj7mfQ6kLZOPOE4EC9HLUD9MKmwpOqYKWC2qrbaKD5by/h7CLd"
SIGNATURE = """\
untrusted comment: signature from minisign secret key
RUSWsGhj7mfQ6hL2tzE2CGz8n8mwqfLUunWSSvR6+6bKPGfHsSpfYFUAQL/X4EKtzQrYycfUo0qRhKwZB8DsyAdkQNDRiMBvOAA=
trusted comment: fleet of the first of December
nJSNQZJXlyidx9EuWlHIcd3zWzxlNDQcF9aXirMHbglUsceyWwOza/r1FFxqJuIEhLaL5DvPk8E7NH7GbvZjBA==
"""
OLD_SIGNATURE = """\
untrusted comment: signature from minisign secret key
RWSWsGhj7mfQ6qDvJOQGEWFzx9WNErqyPCOuZqAUlJNyig+lk37dlCnvDThkJA7OffyY4Hodl41hn7ZKrPTY/j/IMNNY1jvifAM=
trusted comment: timestamp:1796097653	file:a.zip
qoQn7LuMVsNMJAjEFQ9lTFqEbc8nkvz9ePbrXntqSRTmrVXESPerks58zxBoNLTuzhynKDDx4QF5a5w2dwRuCQ==
"""


@pytest.fixture(autouse=True)
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Go to the machine of that name, which has a cache of its own; the first is here."""

    def go(name: str) -> Path:
        monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / name))
        return tmp_path / name / "plans"

    go("here")
    return go


@pytest.fixture
def plans() -> list[Path]:
    """A plan of a GPU, and an engine of the CPU with weights in a file of their own."""
    gpu = obtain(KEY, lambda: Built(plan=b"a plan", tensors={"inputs": []}, figures={"seconds": 1.5}), lambda _: None)
    weights = cache_folder() / "made.weights"
    weights.write_bytes(bytes(range(256)) * 20)
    weights.chmod(0o600)
    engine = Built(plan=b"an engine", tensors={}, figures={}, weights=weights)
    return [gpu, obtain(CPU, lambda: engine, lambda _: None)]


@pytest.fixture
def packed(plans: list[Path], tmp_path: Path) -> Path:
    pack(plans, tmp_path / "fleet.zip")
    return tmp_path / "fleet.zip"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_unpacked_elsewhere_is_what_was_packed(
    plans: list[Path], packed: Path, move: Callable[[str], Path]
) -> None:
    before = [(path.name, path.read_bytes(), describe_plan(path)) for path in plans]
    folder = move("there")
    installed, there = unpack(packed, Trust(sha256=sha256(packed)))
    assert ([path.name for path in installed], there) == (sorted(path.name for path in plans), [])
    for name, data, record in before:
        found = describe_plan(folder / name)
        assert (folder / name).read_bytes() == data
        assert (found.key, found.tensors, found.figures) == (record.key, record.tensors, record.figures)
    engine = folder / plan_path(CPU).name
    assert weights_of(engine).read_bytes() == bytes(range(256)) * 20
    assert plan_trouble(engine) is None
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 5  # nothing is left of the unpacking
    again = unpack(packed, Trust(sha256=sha256(packed).upper()))
    assert again == ([], sorted(installed))
    engine.write_bytes(b"broken")
    assert unpack(packed, Trust(sha256=sha256(packed))) == ([engine], [path for path in installed if path != engine])
    assert unpack(packed, Trust(sha256=sha256(packed)), force=True) == (installed, [])


def test_the_same_plans_are_the_same_bytes(plans: list[Path], packed: Path, tmp_path: Path) -> None:
    record = pack(plans[::-1], tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    assert (record.sha256, record.size) == (sha256(packed), packed.stat().st_size)


def test_nothing_is_installed_that_nobody_vouches_for(packed: Path, move: Callable[[str], Path]) -> None:
    move("there")
    with pytest.raises(InputError, match="only from whom you trust: give --sha256"):
        Trust()
    with pytest.raises(InputError, match="valid: 64 hexadecimal digits"):
        Trust(sha256="abc")
    with pytest.raises(InputError, match="give --key with the public key"):
        Trust(sha256="0" * 64, signature=Path("x"))
    with pytest.raises(InputError, match="not the one given; nothing was installed"):
        unpack(packed, Trust(sha256="0" * 64))
    assert list_plans() == []
    assert list(cache_folder().iterdir()) == []


def test_a_key_that_was_named_vouches_by_its_signature(
    packed: Path, tmp_path: Path, move: Callable[[str], Path]
) -> None:
    pair, stranger = minisign.KeyPair.generate(), minisign.KeyPair.generate()
    (tmp_path / "key.pub").write_bytes(bytes(pair.public_key) + b"\n")
    move("there")
    with pytest.raises(InputError, match=r"is not signed: .*fleet\.zip\.minisig does not exist"):
        unpack(packed, Trust(key=str(tmp_path / "key.pub")))
    beside = packed.with_name("fleet.zip.minisig")
    beside.write_bytes(bytes(stranger.secret_key.sign(packed.read_bytes())))
    with pytest.raises(InputError, match="is not that key's signature of fleet"):
        unpack(packed, Trust(key=str(tmp_path / "key.pub")))
    beside.write_bytes(bytes(pair.secret_key.sign(packed.read_bytes() + b"more")))
    with pytest.raises(InputError, match="is not that key's signature"):
        unpack(packed, Trust(key=str(tmp_path / "key.pub")))
    assert list(cache_folder().iterdir()) == []
    beside.write_bytes(bytes(pair.secret_key.sign(packed.read_bytes())))
    installed, _ = unpack(packed, Trust(key=str(tmp_path / "key.pub"), sha256=sha256(packed)))
    assert len(installed) == 2
    with pytest.raises(InputError, match="not the one given"):  # both have to hold
        unpack(packed, Trust(key=str(tmp_path / "key.pub"), sha256="0" * 64))
    for key in ("no such file", str(packed), "RW" + "A" * 54):
        with pytest.raises(InputError, match=r"is no public key of minisign|is not that key's signature"):
            unpack(packed, Trust(key=key))


def test_signatures_are_those_of_the_program_minisign(tmp_path: Path) -> None:
    path = tmp_path / "signed"
    path.write_bytes(SIGNED)
    path.with_name("signed.minisig").write_text(SIGNATURE)
    Trust(key=PUBLIC).check(path, path)
    path.with_name("signed.minisig").write_text(SIGNATURE.replace("first", "last"))  # the trusted comment is signed
    with pytest.raises(InputError, match="is not that key's signature"):
        Trust(key=PUBLIC).check(path, path)
    path.with_name("signed.minisig").write_text(OLD_SIGNATURE)
    with pytest.raises(InputError, match="of minisign's old kind"):
        Trust(key=PUBLIC).check(path, path)
    path.with_name("signed.minisig").write_text("a web page")
    with pytest.raises(InputError, match="is no signature of minisign"):
        Trust(key=PUBLIC).check(path, path)


def test_a_missing_package_names_its_extra(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "minisign", None)
    with pytest.raises(MissingPackageError, match=r"\[plans\]"):
        unpack(packed, Trust(key=PUBLIC))


def entries(path: Path) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(path) as file:
        return [(info, file.read(info)) for info in file.infolist()]


def rewritten(path: Path, *more: tuple[zipfile.ZipInfo, bytes], **changed: Any) -> bytes:
    """The archive with files added, and its manifest as ``changed`` makes it."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for info, content in [*entries(path), *more]:
            if info.filename == "plans.json" and changed:
                content = json.dumps(changed["manifest"](json.loads(content))).encode()
                info.file_size = len(content)
            file.writestr(info, content)
    return data.getvalue()


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def listing(name: str, content: bytes) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What has the manifest list a file, too."""
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return lambda manifest: manifest | {"files": manifest["files"] | {name: record}}


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {key: value for key, value in manifest.items() if key != name}


def compressed(path: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for info, content in entries(path):
            file.writestr(info.filename, content)
        file.writestr("bomb.plan", bytes(1 << 24))
    return data.getvalue()


def overlapping(_: Path) -> bytes:
    """Every entry of a hundred is the same bytes of the file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(entry("kernel.plan"), bytes(1 << 16))
        first = file.infolist()[0]
        for number in range(100):
            other = entry(f"kernel{number}.plan")
            other.file_size, other.compress_size, other.CRC = first.file_size, first.compress_size, first.CRC
            other.header_offset = first.header_offset
            file.filelist.append(other)
            file.NameToInfo[other.filename] = other
    return data.getvalue()


def long_directory(_: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for number in range(20000):
            file.writestr(entry(f"{number:040d}.plan"), b"")
    return data.getvalue()


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda _: b"", "may be cut off"),
    "no zip file": (lambda _: b"a web page" * 100, "may be cut off"),
    "cut off": (lambda path: path.read_bytes()[:-30], "may be cut off"),
    "cut in the middle": (lambda path: path.read_bytes()[:900] + path.read_bytes()[-22:], "no sound archive"),
    "traversal": (lambda path: rewritten(path, (entry("../up.plan"), b"x")), "not those that its manifest lists"),
    "traversal that is listed": (
        lambda path: rewritten(path, (entry("../up.plan"), b"x"), manifest=listing("../up.plan", b"x")),
        "valid: a plan's file name",
    ),
    "an absolute path": (
        lambda path: rewritten(path, (entry("/etc/x.plan"), b"x"), manifest=listing("/etc/x.plan", b"x")),
        "valid: a plan's file name",
    ),
    "a link": (lambda path: rewritten(path, (entry("a.plan", 0o120777), b"/etc/passwd")), "a link or a device"),
    "a folder": (lambda path: rewritten(path, (entry("folder/", 0o040755), b"")), "a link or a device"),
    "a device": (lambda path: rewritten(path, (entry("a.plan", 0o020666), b"")), "a link or a device"),
    "compressed": (compressed, "compressed or encrypted"),
    "overlapping": (overlapping, "larger than itself"),
    "a long directory": (long_directory, "table of contents has"),
    "a file too many": (lambda path: rewritten(path, (entry("a.plan"), b"x")), "not those that its manifest lists"),
    "a plan without a record": (
        lambda path: rewritten(path, (entry("a.plan"), b"x"), manifest=listing("a.plan", b"x")),
        "a.plan has no record",
    ),
    "weights of no plan": (
        lambda path: rewritten(path, (entry("a.plan.weights"), b"x"), manifest=listing("a.plan.weights", b"x")),
        "belongs to no plan",
    ),
    "no manifest": (lambda path: rewritten_without_manifest(path), "has no plans.json"),
    "a later format": (lambda path: rewritten(path, manifest=lambda found: found | {"format": 2}), "valid: 1"),
    "no version": (lambda path: rewritten(path, manifest=without("calotype")), "calotype"),
    "an unknown field": (lambda path: rewritten(path, manifest=lambda found: found | {"run": "x"}), "run"),
}


def rewritten_without_manifest(path: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for info, content in entries(path)[1:]:
            file.writestr(info, content)
    return data.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_one_line_even_where_its_sha256_is_vouched_for(
    name: str, packed: Path, move: Callable[[str], Path], tmp_path: Path
) -> None:
    make, message = HOSTILE[name]
    hostile = tmp_path / "hostile.zip"
    hostile.write_bytes(make(packed))
    move("there")
    outside = sorted(tmp_path.iterdir())
    for arguments in (["verify"], ["unpack", "--sha256", sha256(hostile)]):
        ran = calotype("plans", *arguments, hostile)
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran
        assert message in ran.stderr
        assert str(hostile) in ran.stderr
    assert list_plans() == []
    assert list(cache_folder().iterdir()) == []
    assert sorted(tmp_path.iterdir()) == sorted([*outside, tmp_path / "there"])


def test_a_name_twice_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = rewritten(packed, entries(packed)[1])
    (tmp_path / "twice.zip").write_bytes(data)
    with pytest.raises(InputError, match="it has a name twice"), open_archive(tmp_path / "twice.zip"):
        pass


def test_bytes_that_changed_on_the_way_install_nothing(packed: Path, move: Callable[[str], Path]) -> None:
    data = packed.read_bytes()
    for what in (b"a plan", bytes(range(256))):
        place = data.rindex(what, 0, data.index(b"PK\x01\x02"))
        packed.write_bytes(data[:place] + b"?" + data[place + 1 :])
        move("there")
        with pytest.raises(InputError, match="copy the archive anew"):
            unpack(packed, Trust(sha256=sha256(packed)))
        assert list(cache_folder().iterdir()) == []


def test_a_record_of_another_plan_is_refused(plans: list[Path], tmp_path: Path) -> None:
    """A plan under the name of another would be run in that one's place."""
    path = tmp_path / "fleet.zip"
    pack(plans, path)
    other = plan_path(KEY | {"network": "vae_decoder"}).name
    data = path.read_bytes().replace(plans[0].name.encode(), other.encode())
    assert len(other) != len(plans[0].name) or data != path.read_bytes()
    renamed = io.BytesIO()
    with zipfile.ZipFile(renamed, "w") as file:
        for info, content in entries(path):
            name = info.filename.replace(plans[0].name, other)
            file.writestr(entry(name), content.replace(plans[0].name.encode(), other.encode()))
    path.write_bytes(renamed.getvalue())
    with pytest.raises(InputError, match="is of another plan"), open_archive(path):
        pass


def test_packing_refuses_what_is_unsound_and_overwrites_nothing(
    plans: list[Path], packed: Path, tmp_path: Path
) -> None:
    before = packed.read_bytes()
    with pytest.raises(InputError, match="exists; use another name"):
        pack(plans, packed)
    assert packed.read_bytes() == before
    with pytest.raises(InputError, match="no plan to pack"):
        pack([], tmp_path / "none.zip")
    plans[0].write_bytes(b"another")
    with pytest.raises(BuildError, match="sha256 is not the recorded one"):
        pack(plans, tmp_path / "unsound.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.zip", "here"]


def test_a_full_disk_is_said_before_anything_is_copied(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BuildError, match="free some space, or set CALOTYPE_CACHE"):
        unpack(packed, Trust(sha256=sha256(packed)))


def test_what_a_killed_unpacking_leaves_is_cleaned_and_not_before() -> None:
    with cache.scratch() as name:
        name("archive").write_bytes(b"half of it")
        assert clean_plans() == 0
        assert name("archive").exists()
        left = name("archive")
    assert not left.exists()
    left.write_bytes(b"half of it")  # as of a process that was killed
    assert clean_plans() == 10
    assert not left.exists()


def test_the_commands_say_what_is_in_it_and_why_it_does_not_run_here(
    packed: Path, plans: list[Path], move: Callable[[str], Path], tmp_path: Path
) -> None:
    move("there")
    verified = calotype("plans", "verify", packed).stdout
    assert f"sha256:     {sha256(packed)}" in verified
    assert "unet of tiny model, float16, 0.0 MiB" in verified
    assert "for a processor of another planet, by cpu 1" in verified
    assert "it was built by version 1, here is" in verified
    assert "does not run here: " in verified
    assert verified.endswith("nothing says yet who made it\n")
    assert calotype("plans", "verify", packed, "--sha256", sha256(packed)).stdout.endswith("its sha256 agrees\n")
    assert calotype("plans", "verify", packed, "--sha256", "0" * 64).returncode == 2
    assert calotype("plans", "unpack", packed).stderr.startswith("calotype: plans are programs")
    assert calotype("plans", "list").stdout == ""
    printed = calotype("plans", "unpack", packed, "--sha256", sha256(packed)).stdout
    assert printed.count("installed: ") == 2
    assert "there already: " in calotype("plans", "unpack", packed, "--sha256", sha256(packed)).stdout
    assert calotype("plans", "list").stdout.count("does not run here: ") == 2
    rows = json.loads(calotype("plans", "list", "--json").stdout)
    assert [Path(row["plan"]).name for row in rows] == sorted(path.name for path in plans)
    assert all(row["misfits"] for row in rows)
    list_plans()[0].write_bytes(b"broken")
    assert "cannot be used: its sha256 is not the recorded one" in calotype("plans", "list").stdout
    out = tmp_path / "again.zip"
    assert "give PLANS" in calotype("plans", "pack", "-o", out).stderr
    assert "sha256" in calotype("plans", "pack", list_plans()[0], "-o", out).stderr
    assert calotype("plans", "pack", list_plans()[1], "-o", out).stdout == f"{sha256(out)}  {out}\n"


def test_archives_above_four_gigabytes_have_a_directory_that_is_found() -> None:
    """Only their last records: the others are gigabytes."""
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, 1 << 30, 1 << 32)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 1 << 33, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, 300, 0xFFFFFFFF, 0)
    data = end64 + locator + end
    with pytest.raises(ValueError, match="table of contents has 1073741824 bytes"):
        archive._check_directory(io.BytesIO(data), len(data))
    small = data.replace(struct.pack("<Q", 1 << 30), struct.pack("<Q", 300))
    archive._check_directory(io.BytesIO(small), len(small))
