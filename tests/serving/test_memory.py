"""What pictures and models take, and what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.serving.workers.memory import DOUBT, Footprint, available, model_bytes, resident


def test_a_footprint_grows_with_the_pixels_and_their_square() -> None:
    def taken(pixels: int) -> int:
        return 1000 * pixels + pixels**2 // 100

    footprint = Footprint(points=tuple((side**2, taken(side**2)) for side in (256, 128)))
    assert footprint.bytes_of(100**2) == taken(128**2)
    assert footprint.bytes_of(200**2) == taken(256**2)
    assert footprint.bytes_of(1024**2) == pytest.approx(DOUBT * taken(1024**2), rel=0.01)


def test_of_one_size_a_footprint_is_in_proportion_and_of_none_it_is_nothing() -> None:
    assert Footprint(points=((100, 5000),)).bytes_of(200) == DOUBT * 10000
    assert Footprint().bytes_of(10**9) == 0
    assert Footprint(points=((100, 500), (200, 600))).bytes_of(400) == DOUBT * 1200


def test_what_is_left_is_the_least_of_the_machine_and_its_group(tmp_path: Path) -> None:
    machine, processes, group = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups" / "served"
    group.mkdir(parents=True)
    machine.write_text("MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    processes.write_text("0::/served\n")
    where = machine, processes, tmp_path / "groups"
    assert available(*where) == 500 * 1024
    for name, text in (("max", "max"), ("current", "300000"), ("stat", "anon 5\ninactive_file 100000\n")):
        (group / f"memory.{name}").write_text(text)
    assert available(*where) == 500 * 1024
    (group / "memory.max").write_text("400000")
    assert available(*where) == 200000
    (group / "memory.max").write_text("100000")
    assert available(*where) == 0
    assert available(tmp_path / "a", tmp_path / "b", tmp_path) is None


def test_a_process_and_a_model_take_something() -> None:
    now, peak = resident()
    assert 0 < now <= peak
    bundle = Bundle.open("talbot", weights=False)
    whole, small = (model_bytes(bundle, "cpu", low_memory=low) for low in (False, True))
    weights = sum(record.size for name, record in bundle.manifest.files.items() if name.endswith(".safetensors"))
    assert weights < whole <= 2.1 * weights
    assert small < whole
