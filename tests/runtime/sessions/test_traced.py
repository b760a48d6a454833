"""Where the time went: stages, networks and operators add up, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from calotype.runtime.picture import Timings
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions.traced import NetworkTrace, Trace


@pytest.mark.parametrize("low_memory", [False, True])
def test_operators_are_within_the_runs_and_runs_within_the_stages(low_memory: bool) -> None:
    trace = Trace()
    with Pipeline.load("talbot", "cpu", trace=trace, low_memory=low_memory) as pipeline:
        timings = pipeline("a red apple", num_inference_steps=3, seed=0).timings
    assert {name: own.runs for name, own in trace.networks.items()} == {
        "text_encoder": 2,
        "unet": 3,
        "vae_decoder": 1,
    }
    for own in trace.networks.values():
        assert own.opening > 0
        assert 0 < sum(own.operators.values()) <= own.running
    unet = trace.networks["unet"]
    assert unet.running <= timings.denoising
    assert {"Conv", "MatMul"} <= unet.operators.keys()
    text = trace.text(timings, 2 * timings.total)
    assert "3 runs" in text
    assert "unet ran 3 times" in text


def test_what_took_longest_comes_first() -> None:
    trace = Trace()
    trace.networks["one"] = NetworkTrace(runs=1, running=1.0)
    trace.networks["two"] = NetworkTrace(runs=3, running=2.0, operators={"Add": 0.5, "Conv": 1.25})
    timings = Timings(denoising=3.0, total=3.0)
    text = trace.text(timings, 4.0)
    places = [text.index(part) for part in ("two ran 3 times, 2.000 s", "Conv", "Add", "all else", "one ran 1.000 s")]
    assert places == sorted(places)
    assert "0.250 s  12.5 %" in text


def test_the_picture_is_the_same_and_no_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Pipeline.load("talbot", "cpu") as plain, Pipeline.load("talbot", "cpu", trace=Trace()) as watched:
        pictures = [own("a red apple", num_inference_steps=2, seed=0).images[0] for own in (plain, watched)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calotype.runtime", "generate", "a red apple", "-o", str(tmp_path / "a.png")]
    command += ["--steps", "2", "--backend", "cpu", "--trace", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "s, of which" in done.stderr
    assert "Conv" in done.stderr
    assert json.loads(done.stdout)["trace"]["unet"]["runs"] == 2
