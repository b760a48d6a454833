"""What accelerations cost, as it is counted and written down."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import fast
from calotype.runtime import pipeline as pipelines
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.denoising.denoiser import INT8
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session
from training.config import TALBOT


def test_the_command_that_is_written_down_has_the_modes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(fast, "talbot", lambda *arguments: seen.append(arguments) or {})
    fast.main(["talbot", "--every", "70", "--modes", "fast", "cache 2"])
    assert json.loads(capsys.readouterr().out)["command"] == (
        "python -m benchmarks.fast talbot --every 70 --modes fast 'cache 2'"
    )
    ((steps, every, modes),) = seen
    assert (steps, every, list(modes)) == (20, 70, ["exact", "fast", "cache 2"])


@pytest.mark.parametrize("int8", [False, True])
def test_operations_are_counted_whatever_runs(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 engine, where the cache has one, is played by a session in float32: which one runs is what counts."""
    monkeypatch.setattr(pipelines, "has_int8", lambda *_: int8)
    monkeypatch.setattr(
        pipelines,
        "open_session",
        lambda *arguments, **how: open_session(*arguments, **{**how, "form": None}),
    )
    counts = fast.unet_operations(TALBOT.unet, 16, 32)
    caching = Acceleration(cache_interval=2)
    with Pipeline.load("talbot", "cpu") as pipeline:
        fast.count_operations(pipeline, [EXACT, caching, FAST])
        assert (INT8 in pipeline.engines) == int8
        for acceleration, operations in (
            (EXACT, 2 * counts["unet"]),
            (FAST, 2 * counts["unet"]),
            (caching, counts["unet_deep"] + counts["unet_shallow"]),
        ):
            before = fast.Counted.total
            assert pipeline("a", fast=acceleration, num_inference_steps=2, seed=0).int8 == (
                int8 and acceleration is FAST
            )
            assert fast.Counted.total - before == pytest.approx(2 * operations)  # guided: two rows
