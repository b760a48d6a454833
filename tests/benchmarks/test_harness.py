"""The harness: its noise, its protocol with a peer's process, and what it says of pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.checkpoints import Model
from benchmarks.noise import normal
from benchmarks.peers.protocol import Task
from benchmarks.speed import Plan, psnr
from benchmarks.timing import spread
from benchmarks.workers import PeerError, Worker
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from tests.engine.any_processor import let_build_int8


def task(folder: Path, size: int) -> Task:
    np.save(folder / "latents.npy", normal(0, (1, 16, size // 8, size // 8)))
    return Task(
        prompt="red apple, noto style",
        negative_prompt="",
        height=size,
        width=size,
        steps=2,
        guidance_scale=3.0,
        images=1,
        seed=0,
        latents=str(folder / "latents.npy"),
        output=str(folder / "pictures.npy"),
    )


def test_the_noise_is_that_of_pytorch_on_a_gpu() -> None:
    # torch.manual_seed(0); torch.randn(5, device="cuda")
    np.testing.assert_allclose(normal(0, (5,)), [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209], atol=5e-5)


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """One that finds Calotype in the sources."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:build/types" exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def test_a_peer_answers_and_its_memory_is_seen(interpreter: Path, tmp_path: Path) -> None:
    with Worker(interpreter, "benchmarks.peers.calotype_peer") as worker:
        assert "onnxruntime" in worker.load(Path("talbot"), "")["versions"]
        answer = worker.generate(task(tmp_path, 64))
        assert len(answer["steps"]) == 2
        assert sum(answer["steps"]) < answer["seconds"]
        assert np.load(tmp_path / "pictures.npy").shape == (1, 64, 64, 3)
        with pytest.raises(PeerError, match="InputError"):
            worker.generate(task(tmp_path, 60))
    assert 50e6 < worker.peak["anonymous"] <= worker.peak["resident"]


def test_the_fast_mode_takes_half_the_steps_with_an_engine_in_int8(
    interpreter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "engines"))
    with Worker(interpreter, "benchmarks.peers.calotype_peer") as worker:
        with pytest.raises(PeerError, match="no engine in int8"):
            worker.load(Path("talbot"), "fast")
        let_build_int8(monkeypatch)
        build_engines(Bundle.open("talbot"), networks=["unet"], precision="int8")
        worker.load(Path("talbot"), "fast")
        assert len(worker.generate(task(tmp_path, 64))["steps"]) == 1


def test_results_of_other_pictures_or_steps_have_names_of_their_own() -> None:
    model = Model(name="sd1", checkpoint=Path("checkpoint"), bundle=Path("bundle"), size=512)
    plans = {
        (images, steps): Plan(model=model, size=256, steps=steps, images=images, rounds=3).name
        for images in (1, 2)
        for steps in (4, 28)
    }
    assert plans == {
        (1, 4): "speed-sd1-256",
        (2, 4): "speed-sd1-256-images2",
        (1, 28): "speed-sd1-256-steps28",
        (2, 28): "speed-sd1-256-images2-steps28",
    }


def test_the_command_of_a_pair_is_whole() -> None:
    model = Model(name="sd1", checkpoint=Path("checkpoint"), bundle=Path("bundle"), size=512)
    plan = Plan(model=model, size=256, steps=2, images=8, rounds=3)
    whole = "python -m benchmarks --model sd1 --size 256 --steps 2 --images 8 --rounds 3 --peers diffusers"
    assert plan.command("benchmarks", "diffusers") == whole


def test_pictures_and_ratios_are_put_in_figures() -> None:
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(black, black) is None
    assert psnr(black, black + np.uint8(255)) == 0
    assert spread([3.0, 1.0, 2.0], 1) == {"median": 2.0, "min": 1.0, "max": 3.0}
