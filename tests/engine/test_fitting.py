"""What fits a device: held against the figures of ``calotype info``, and against itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from calotype.engine.fitting import DRIVER, parse_size, ways
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE
from calotype.runtime.errors import InputError
from calotype.runtime.graphs.files import weight_bytes
from tests.runtime.command_line import calotype


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("6 GiB", 6 << 30), ("7.5gib", 15 << 29), ("6144MiB", 6 << 30), ("900mb", 900 * 10**6)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "6", "GB", "0GB", "-6GB", "6TB", "1e9GB", "6GB more", "٦GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="valid: a number with MB, GB"):
        parse_size(text)


def test_every_saving_saves_and_weights_are_those_of_the_graphs() -> None:
    bundle = Bundle.open("talbot")
    found = {(way.precision, way.options): way.size for way in ways(bundle)}
    tiny = "a tiny decoder: --vae"
    for precision in {precision for precision, _ in found}:
        whole, low = found[precision, ()], found[precision, ("--low-memory",)]
        assert low < whole
        assert found[precision, (tiny,)] < whole
        assert found[precision, ("--low-memory", tiny)] <= low
        networks = bundle.manifest.networks.items()
        graphs = [bundle.path / spec.graphs[precision] for name, spec in networks if name not in ASIDE]
        assert whole > sum(map(weight_bytes, graphs)) + DRIVER
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_the_command_names_what_fits_and_what_to_do_where_nothing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sorted(way.size for way in ways(Bundle.open("talbot")))
    between = (sizes[0] + sizes[-1]) // 2 >> 20
    lines = calotype("info", "talbot", "--device", f"{between}MiB").stdout.splitlines()
    assert "for one guided picture of 128x128" in lines[0]
    assert sum(line.startswith("fits:") for line in lines) == sum(size <= between << 20 for size in sizes)
    assert sum(line.startswith("too large:") for line in lines) == sum(size > between << 20 for size in sizes)
    assert (
        calotype("info", "talbot", "--device", "10MB").stdout.splitlines()[-1].startswith("nothing fits: use smaller")
    )
    assert calotype("info", "talbot", "--device", "lots").returncode == 2
    monkeypatch.setitem(__import__("sys").modules, "calotype.engine.fitting", None)
    assert "export" in calotype("info", "talbot", "--device", "6GB").stderr


def test_a_bundle_of_other_networks_is_told_too(tiny_bundle: Path) -> None:
    assert len(ways(Bundle.open(tiny_bundle))) >= 4
