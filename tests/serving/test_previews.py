"""The linear map from latents to colours, and what latents are likely to become."""

from __future__ import annotations

import numpy as np
import pytest

from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.serving.workers.previews import PreviewMap, denoised


def test_a_linear_decoder_is_learned() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.uniform(-0.1, 0.1, (4, 3))
    previews, found = PreviewMap(), []
    for _ in range(4):
        latents = rng.standard_normal((4, 6, 5), np.float32)
        colours = np.clip(np.einsum("chw,ck->hwk", latents, mixing) + 0.5, 0, 1)
        pixels = np.kron(colours, np.ones((8, 8, 1)))
        found.append((latents, colours))
        previews.learn(latents, (pixels * 255).round().astype(np.uint8))
    for latents, colours in found:
        shown = previews.show(latents)
        assert shown is not None
        assert shown.shape == (6, 5, 3)
        assert np.abs(shown / 255 - colours).max() < 0.02


def test_nothing_is_shown_before_something_is_learned() -> None:
    previews = PreviewMap()
    assert previews.show(np.zeros((4, 2, 2), np.float32)) is None
    previews.learn(np.ones((4, 2, 2), np.float32), np.full((16, 16, 3), 200, np.uint8))
    assert previews.show(np.zeros((8, 2, 2), np.float32)) is None
    shown = previews.show(np.full((4, 2, 2), np.nan, np.float32))
    assert shown is not None


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_previews_of_talbot_come_nearer_to_its_picture(scheduler: str) -> None:
    with Pipeline.load("talbot", "cpu") as pipeline:
        previews = PreviewMap()
        request = Request(prompt="a red apple", seed=3, num_inference_steps=8, scheduler=scheduler)
        shown, job = [], pipeline.prepare(request)
        kept = []
        while not job.done:
            kept.append(denoised(job))
            pipeline.step([job])
        pixels = np.asarray(pipeline.finish(job).image)
        previews.learn(job.latents, pixels)
        size = len(kept[0][0])
        small = pixels.reshape(size, len(pixels) // size, size, len(pixels) // size, 3).mean((1, 3))
        for latents in [*kept, denoised(job)]:
            preview = previews.show(latents)
            assert preview is not None
            shown.append(float(np.sqrt(np.mean((preview - small) ** 2))))
    assert shown[-1] < shown[4] < shown[0]
    assert shown[-1] < 30  # of 255: what a linear map leaves of talbot's decoder
