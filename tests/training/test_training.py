"""The parts of training that can be told right from wrong without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training.captions import Concept, captions, held_out, sample_caption
from training.run import EMA, Run
from training.unet import alphas_cumprod

APPLE = Concept(slug="red-apple", name="red apple", keywords=("fruit",), group=4)


def test_captions_name_the_concept_or_a_keyword_and_the_style() -> None:
    texts = captions(APPLE, "noto")
    assert "red apple, noto style" in texts
    assert "a red apple in noto style" in texts
    assert all("noto" in text and ("red apple" in text or "fruit" in text) for text in texts)
    assert len(set(texts)) == len(texts)
    rng = np.random.default_rng(0)
    drawn = {sample_caption(APPLE, "noto", rng) for _ in range(500)}
    assert drawn <= {*texts, "red apple", "a red apple"}
    assert {"red apple, noto style", "red apple"} <= drawn


def test_the_held_out_rule_takes_about_a_twentieth_and_never_changes() -> None:
    out = [held_out(f"concept-{index}", "noto") for index in range(2000)]
    assert 60 < sum(out) < 140
    assert [held_out("red-apple", style) for style in ("noto", "twemoji", "fluent")] == [False, False, False]


def test_noise_schedule_is_diffusers_linear() -> None:
    import diffusers

    reference = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(), reference, rtol=1e-4, atol=1e-7)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def start(minutes: float) -> tuple[Run, torch.nn.Linear]:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = EMA(model, 0.9)
        run = Run("line", tmp_path, minutes, every=60)
        parts = {"model": model, "optimizer": optimizer, "ema": ema}
        run.resume(parts)
        for update in run.steps(optimizer, 0.1, parts):
            update(model(torch.ones(4, 2)).square().mean())
            ema.update(run.step)
        return run, model

    first, trained = start(0.005)
    assert first.step > 0
    second, again = start(0.005)
    assert second.step == first.step
    torch.testing.assert_close(again.weight, trained.weight)
    third, _ = start(0.01)
    assert third.step > first.step
