"""The harness: its noise, its protocol with a peer's process, and what it says of pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.noise import normal
from benchmarks.peers.protocol import Task
from benchmarks.speed import psnr, spread
from benchmarks.workers import PeerError, Worker


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


def test_a_peer_answers_and_its_memory_is_seen(tmp_path: Path) -> None:
    interpreter = tmp_path / "bin" / "python"
    interpreter.parent.mkdir()
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:build/types" exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    with Worker(interpreter, "benchmarks.peers.calotype_peer") as worker:
        assert "onnxruntime" in worker.load(Path("talbot"), "")["versions"]
        answer = worker.generate(task(tmp_path, 64))
        assert len(answer["steps"]) == 2
        assert sum(answer["steps"]) < answer["seconds"]
        assert np.load(tmp_path / "pictures.npy").shape == (1, 64, 64, 3)
        with pytest.raises(PeerError, match="InputError"):
            worker.generate(task(tmp_path, 60))
    assert 50e6 < worker.peak["anonymous"] <= worker.peak["resident"]


def test_pictures_and_ratios_are_put_in_figures() -> None:
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(black, black) is None
    assert psnr(black, black + np.uint8(255)) == 0
    assert spread([3.0, 1.0, 2.0], 1) == {"median": 2.0, "min": 1.0, "max": 3.0}
