"""``calotype bench`` on the command line, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from calotype.runtime.diagnostics.benchmark import InstantSession, host_overhead
from tests.runtime.command_line import calotype


def test_it_measures_a_bundle_and_says_so_as_json(tiny_bundle: Path) -> None:
    result = calotype(
        "bench",
        tiny_bundle,
        "--backend",
        "cpu",
        "--steps",
        "2",
        "--images",
        "1",
        "--images",
        "2",
        "--rounds",
        "1",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [row["images"] for row in report["latency"]] == [1, 2]
    for row in report["latency"]:
        assert 0 < 2 * row["images"] * row["step_s"] / 2 <= row["images"] * row["picture_s"]
    assert {row["disk_cache"] for row in report["cold_start"]} == {"cold", "warm"}
    assert all(row["seconds"] > 0.05 and row["peak_resident_mb"] > 20 for row in report["cold_start"])
    if Path("/proc/self/status").exists():
        assert all(10 < row["peak_own_mb"] < row["peak_resident_mb"] for row in report["cold_start"])
    assert [(row["latents"], row["jobs"]) for row in report["host"]] == [
        ("64x64x4", 1),
        ("64x64x4", 8),
        ("128x128x4", 1),
        ("128x128x4", 8),
    ]


def test_a_person_gets_a_table(tiny_bundle: Path) -> None:
    result = calotype("bench", tiny_bundle, "--backend", "cpu", "--steps", "1", "--images", "1", "--rounds", "1")
    assert result.returncode == 0, result.stderr
    assert "tiny on cpu" in result.stdout
    assert "pixels  images  picture_s  step_s" in result.stdout


def test_a_bundle_that_is_not_there_is_one_line() -> None:
    result = calotype("bench", "nowhere")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1


def test_a_step_of_the_host_allocates_no_array_of_latents() -> None:
    latents = 4 * 64 * 64 * np.dtype(np.float32).itemsize
    assert host_overhead(64)["allocated_bytes"] < latents


def test_the_instant_session_has_buffers_of_the_shapes_asked_for() -> None:
    session = InstantSession(4, 8)
    sizes = {"rows": 2, "tokens": 3, "height": 5, "width": 6}
    session.reserve(sizes)
    assert session.buffer("sample", sizes).shape == (2, 4, 5, 6)
    assert session.buffer("encoder_hidden_states", sizes).shape == (2, 3, 8)
