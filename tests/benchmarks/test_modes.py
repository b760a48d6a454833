"""What modes of drawing cost, as it is counted and written down."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.operations import unet_operations
from benchmarks.quality import fast_modes as fast
from benchmarks.quality import modes
from benchmarks.quality.drawing import Drawing
from calotype.runtime import networks
from calotype.runtime.bundle.form import FLOAT32, INT8
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.picture import Timings
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session
from training.config import TALBOT


def test_the_command_that_is_written_down_has_the_modes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(modes, "measure", lambda *arguments: seen.append(arguments) or {})
    modes.main(["fast", "--every", "70", "--modes", "fast", "cache 2"])
    assert json.loads(capsys.readouterr().out)["command"] == (
        "python -m benchmarks.quality.modes fast --every 70 --modes fast 'cache 2'"
    )
    ((_, names, steps, seeds, every),) = seen
    assert (names, steps, seeds, every) == (["exact", "fast", "cache 2"], 20, 1, 70)


def test_a_mode_of_another_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        modes.main(["int8", "--modes", "cache 2"])
    assert "there is no mode 'cache 2' in int8; valid: exact, MatMul in int8," in capsys.readouterr().err


@pytest.mark.parametrize("name", modes.SETS)
def test_every_set_has_exact_pictures(name: str) -> None:
    assert "exact" in importlib.import_module(modes.SETS[name]).NAMES


def test_modes_take_turns_and_are_compared_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a set that draws in no time: one mode is exact, one is half as dark in a third of the time."""
    drawn: list[tuple[str, str, int]] = []

    def draw(mode: str, prompt: str, seed: int) -> Drawing:
        drawn.append((mode, prompt, seed))
        grey = Image.new("RGB", (128, 128), (100, 100, 100) if mode == "exact" else (50, 50, 50))
        seconds = 3.0 if mode == "exact" else 1.0
        return Drawing(SimpleNamespace(images=[grey], timings=Timings(denoising=seconds)), 4.0 * seconds)

    fake = SimpleNamespace(opened=lambda _, names, __: {name: partial(draw, name) for name in names})
    monkeypatch.setattr(modes.data, "data_path", lambda _: Path(__file__))
    monkeypatch.setattr(modes.data, "load", lambda _: None)
    monkeypatch.setattr(modes, "load_gallery", lambda _: None)
    monkeypatch.setattr(modes, "judge", lambda *_: {"seen_top5": 1.0})
    monkeypatch.setattr(modes, "retrieved", lambda queries, *_: np.ones(len(queries), bool))
    report = modes.measure(fake, ["exact", "dark"], steps=2, seeds=2, every=200)
    assert [mode for mode, *_ in drawn] == ["exact", "dark"] * 4
    assert [seed for *_, seed in drawn] == [0] * 4 + [1] * 4
    dark = report["modes"]["dark"]
    assert (dark["time"], dark["operations"]) == (3.0, 3.0)
    assert dark["psnr_db"] == pytest.approx(20 * np.log10(255 / 50), abs=0.1)
    assert report["modes"]["exact"]["psnr_db"] is None


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    return unet_operations(TALBOT.unet, 16, 32)


@pytest.mark.parametrize("int8", [False, True])
def test_operations_are_counted_whatever_runs(
    int8: bool, counts: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The int8 engine, where the cache has one, is played by a session in float32: which one runs is what counts."""
    monkeypatch.setattr(networks, "has_int8", lambda *_: int8)
    monkeypatch.setattr(
        networks,
        "open_session",
        lambda *arguments, **how: open_session(*arguments, **{**how, "form": FLOAT32}),
    )
    monkeypatch.setattr(fast, "unet_operations", lambda *_: counts)
    caching = Acceleration(cache_interval=2)
    with Pipeline.load("talbot", "cpu") as pipeline:
        fast.count_operations(pipeline, [EXACT, caching, FAST])
        assert ("unet_int8" in pipeline.engines) == int8
        for acceleration, operations in (
            (EXACT, 2 * counts["unet"]),
            (FAST, 2 * counts["unet"]),
            (caching, counts["unet_deep"] + counts["unet_shallow"]),
        ):
            before = fast.Counted.total
            output = pipeline("a", fast=acceleration, num_inference_steps=2, seed=0, height=64, width=64)
            assert (output.pictures[0].settings.form == INT8) == (int8 and acceleration is FAST)
            assert fast.Counted.total - before == pytest.approx(2 * operations)  # guided: two rows
